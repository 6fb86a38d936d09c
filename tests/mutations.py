"""Whether the tests notice mistakes: each is made in a copy of the repository, and the tests must fail.

    python -m tests.mutations
    python -m tests.mutations --only cg-beta --only damping-forgotten
    python -m tests.mutations --list

A mistake is one replacement of text in the numerics, most of them made by some published implementation. The test
files that ought to notice it run first, then all others. The exit status is 1 if a mistake survives, if its text is
not found exactly once (the list must follow the code), or if the copy fails without any mistake.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 1800
"""Seconds for one run of tests; a mistake that makes them endless counts as noticed."""


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        name: what it is called on the command line.
        file: where it is made.
        old: the text that is replaced, found exactly once in the file.
        new: what replaces it.
        meaning: what goes wrong, in words.
        tests: the tests that ought to notice it, by file: ``"updater hatrpo::test_one_agent_is_trpo"``.
    """

    name: str
    file: str
    old: str
    new: str
    meaning: str
    tests: str

    @property
    def test_ids(self) -> list[str]:
        """The tests as pytest names them."""
        return [_test_id(name) for name in self.tests.split()]


MUTATIONS = (
    # Vectors
    Mutation(
        "regions-interleaved",
        "torchrl_trpo/numerics/vectors.py",
        "tensor.reshape(n_regions, -1) for",
        "tensor.reshape(-1, n_regions).T for",
        "a flat vector mixes the parameters of several agents",
        "numerics/updater",
    ),
    # Conjugate gradient
    Mutation(
        "cg-beta",
        "torchrl_trpo/numerics/conjugate_gradient.py",
        "r + rr_next / rr * p",
        "r + rr / rr_next * p",
        "directions are conjugated with the inverse of beta",
        "numerics/conjugate_gradient",
    ),
    Mutation(
        "cg-absolute-tolerance",
        "torchrl_trpo/numerics/conjugate_gradient.py",
        "tol**2 * bb",
        "tol**2",
        "stops on an absolute residual: a small gradient gets a step along itself (HARL)",
        "numerics/conjugate_gradient",
    ),
    Mutation(
        "cg-negative-curvature",
        "torchrl_trpo/numerics/conjugate_gradient.py",
        "~(rr <= tol**2 * bb) & ~(pAp <= 0)",
        "~(rr <= tol**2 * bb)",
        "follows directions along which the curvature is not positive",
        "numerics/conjugate_gradient",
    ),
    # Fisher products
    Mutation(
        "metric-diagonal",
        "torchrl_trpo/numerics/fisher.py",
        "(blocks * torch.cat(list(tangents), -1).unsqueeze(-2)).sum(-1)",
        "(blocks.diagonal(dim1=-2, dim2=-1) * torch.cat(list(tangents), -1))",
        "the distribution's own Fisher matrix without what couples its parameters",
        "numerics/fisher",
    ),
    # Line search
    Mutation(
        "kl-not-checked",
        "torchrl_trpo/numerics/line_search.py",
        "& enough & inside & finite",
        "& enough & finite",
        "accepts a step whatever its KL",
        "numerics/line_search",
    ),
    Mutation(
        "accept-ratio-ignored",
        "torchrl_trpo/numerics/line_search.py",
        "new_improvement >= accept_ratio * share * expected_improvement",
        "new_improvement >= 0",
        "accepts any improvement",
        "numerics/line_search",
    ),
    Mutation(
        "expected-not-scaled",
        "torchrl_trpo/numerics/line_search.py",
        "accept_ratio * share * expected_improvement",
        "accept_ratio * expected_improvement",
        "asks a fraction of the step for the improvement of the full step",
        "numerics/line_search",
    ),
    Mutation(
        "expected-compounds",
        "torchrl_trpo/numerics/line_search.py",
        "accept_ratio * share * expected_improvement",
        "accept_ratio * backtrack_coeff ** (tries * (tries + 1) / 2) * expected_improvement",
        "scales the prediction once more at each try (skrl)",
        "numerics/line_search",
    ),
    Mutation(
        "all-or-none",
        "torchrl_trpo/numerics/line_search.py",
        "now = possible & ~accepted & enough & inside & finite",
        "now = (possible & ~accepted & enough & inside & finite).all().expand_as(possible)",
        "one agent's failure rejects the steps of all",
        "numerics/line_search",
    ),
    Mutation(
        "refused-kl-reported",
        "torchrl_trpo/numerics/line_search.py",
        "kl = torch.where(now, new_kl.clamp_min(0), kl)",
        "kl = torch.where(accepted, kl, new_kl.clamp_min(0))",
        "reports the KL of the candidate that was refused (tianshou, HARL)",
        "numerics/line_search",
    ),
    # The step
    Mutation(
        "step-without-2",
        "torchrl_trpo/numerics/updater.py",
        "(2 * max_kl / xFx)",
        "(max_kl / xFx)",
        "√(δ / xᵀHx) in place of √(2δ / xᵀHx)",
        "numerics/updater",
    ),
    Mutation(
        "step-without-damping",
        "torchrl_trpo/numerics/updater.py",
        "x * (g - residual)",
        "x * fisher(x)",
        "the length of the step from the matrix without damping",
        "numerics/updater",
    ),
    Mutation(
        "damping-forgotten",
        "torchrl_trpo/numerics/updater.py",
        "fisher(v) + self.damping * v",
        "fisher(v)",
        "solves without damping",
        "numerics/updater",
    ),
    Mutation(
        "damping-multiplied",
        "torchrl_trpo/numerics/updater.py",
        "fisher(v) + self.damping * v",
        "(1 + self.damping) * fisher(v)",
        "damping lengthens the products in place of the diagonal",
        "numerics/updater",
    ),
    Mutation(
        "gradient-not-scaled",
        "torchrl_trpo/numerics/updater.py",
        "g = gradient / torch.where(scale > 0, scale, 1.0)",
        "g = gradient",
        "the squares of a small gradient vanish in float32",
        "numerics/updater",
    ),
    Mutation(
        "rejected-step-kept",
        "torchrl_trpo/numerics/updater.py",
        "problem.write(found, search.accepted)",
        "problem.write(theta + search.fraction.clamp_min(0.1).unsqueeze(-1) * full_step, ~search.kl.isnan())",
        "the last candidate stays when none was accepted (MARLlib)",
        "numerics/updater",
    ),
    Mutation(
        "one-fraction-for-all",
        "torchrl_trpo/numerics/updater.py",
        "found = theta + search.fraction.unsqueeze(-1) * full_step",
        "found = theta + search.fraction.max() * full_step",
        "every agent takes the fraction that suits one of them",
        "numerics/updater",
    ),
    Mutation(
        "statistics-by-position",
        "torchrl_trpo/numerics/updater.py",
        "stats[order.argsort()]",
        "stats[order]",
        "statistics are sorted by the inverse of the order",
        "objectives/hatrpo",
    ),
    Mutation(
        "team-budget-by-scaled-gradients",
        "torchrl_trpo/numerics/updater.py",
        "xFx * (scale / scale.max()).square()",
        "xFx",
        "a team's budget is shared out as if all gradients had the same length",
        "objectives/hatrpo",
    ),
    Mutation(
        "team-budget-with-negative-shares",
        "torchrl_trpo/numerics/updater.py",
        "scale.isfinite() & xFx.isfinite() & (xFx > 0)",
        "scale.isfinite() & xFx.isfinite() & (scale > 0)",
        "negative curvature takes from an agent's share, and gives the others more than the team's budget",
        "objectives/hatrpo",
    ),
    Mutation(
        "team-budget-of-one-agent",
        "torchrl_trpo/numerics/updater.py",
        "len(gains) * gains / gains.sum()",
        "gains / gains.sum()",
        "a team shares out max_kl, and not n times as much",
        "objectives/hatrpo",
    ),
    Mutation(
        "greedy-order-forgets-what-was-spent",
        "torchrl_trpo/numerics/updater.py",
        "* max_kl - spent\n",
        "* max_kl\n",
        "a greedy team's later agents share the whole budget, and not what is left",
        "objectives/hatrpo",
    ),
    Mutation(
        "greedy-order-takes-the-first",
        "objectives/hatrpo.py",
        "place = int(self._ranks.first_(found).argmax())",
        "place = 0",
        "a greedy order takes the agents by index",
        "objectives/hatrpo",
    ),
    Mutation(
        "subsample-ignored",
        "torchrl_trpo/numerics/updater.py",
        "problem.fisher_product(self.fisher_subsample)",
        "problem.fisher_product(1.0)",
        "the Fisher matrix is that of all rows whatever the setting",
        "numerics/updater",
    ),
    # Divergences, entropies, distributions
    Mutation(
        "kl-unweighted",
        "torchrl_trpo/distributions/divergence.py",
        "(p.probs * (log_p - log_q)).sum(-1)",
        "((log_q - log_p).exp() - 1 - (log_q - log_p)).sum(-1)",
        "the categorical KL is not weighted by π (HARL)",
        "objectives/trpo",
    ),
    Mutation(
        "masked-curvature",
        "torchrl_trpo/distributions/divergence.py",
        "allowed = p.probs > 0",
        "allowed = p.probs > -1",
        "actions that are masked enter the KL",
        "objectives/trpo",
    ),
    Mutation(
        "parameters-left",
        "objectives/functional.py",
        "registry.update(own)",
        "pass",
        "an error leaves the policy without its parameters",
        "objectives/interrupted",
    ),
    Mutation(
        "agents-before-left",
        "torchrl_trpo/numerics/updater.py",
        "                restore()",
        "                pass",
        "an error in the sequence leaves the agents before it moved",
        "objectives/interrupted",
    ),
    Mutation(
        "batch-dimension-excluded",
        "objectives/policy_update.py",
        "if dim < tensordict.batch_dims",
        "if dim < 0",
        "each time step's advantages are normalised for themselves",
        "objectives/trpo",
    ),
    Mutation(
        "others-slices-allowed",
        "objectives/agent_checks.py",
        "others = [other for other in agents if other != agent]",
        "others = []",
        "regions of agents that see each other",
        "objectives/agent_checks",
    ),
    Mutation(
        "common-entries-of-one-agent",
        "objectives/policy_update.py",
        "return flatten(common=common) if common else rows",
        "return rows",
        "what masked agents see is replaced, though the others read it",
        "objectives/policy_rows",
    ),
    Mutation(
        "ratios-of-the-masked",
        "objectives/policy_rows.py",
        "torch.where(self.weight > 0, log_ratio, 0.0)",
        "log_ratio + 0.0",
        "the ratio of an action that a masked agent has not taken",
        "objectives/policy_rows",
    ),
    Mutation(
        "mismatch-of-the-kept",
        "objectives/policy_region.py",
        "torch.maximum(self._log_ratio_max, log_ratio.abs().amax(self._summed))",
        "torch.maximum(self._log_ratio_max, log_ratio.amax(self._summed))",
        "data that is likelier than the policy says is not told",
        "numerics/updater",
    ),
    Mutation(
        "parts-averaged",
        "torchrl_trpo/distributions/divergence.py",
        "return torch.stack([sum_events(part, ndim) for part in parts]).sum(0)",
        "return torch.stack([sum_events(part, ndim) for part in parts]).mean(0)",
        "KL and log-probability of a composite action are means over its parts",
        "objectives/trpo",
    ),
    Mutation(
        "dimensions-averaged",
        "torchrl_trpo/distributions/divergence.py",
        "values.flatten(batch_dims).sum(-1)",
        "values.flatten(batch_dims).mean(-1)",
        "the mean over the entries of an action that are independent (sb3-contrib, omnisafe)",
        "objectives/trpo",
    ),
    Mutation(
        "squashing-forgotten",
        "torchrl_trpo/distributions/divergence.py",
        "base.entropy() + (expected.sum(event_dims) if event_dims else expected)",
        "base.entropy()",
        "the entropy of a squashed normal is that of the normal",
        "objectives/trpo",
    ),
    Mutation(
        "entropies-averaged",
        "torchrl_trpo/distributions/multi_categorical.py",
        "torch.stack([part.entropy() for part in self.categoricals]).sum(0)",
        "torch.stack([part.entropy() for part in self.categoricals]).mean(0)",
        "the entropy of several discrete actions is their mean",
        "objectives/trpo",
    ),
    # The surrogate and its rows
    Mutation(
        "ratio-inverted",
        "objectives/policy_rows.py",
        "log_ratio = log_prob(dist, self.action, self.log_prob.ndim - 1).unsqueeze(-1) - self.log_prob",
        "log_ratio = self.log_prob - log_prob(dist, self.action, self.log_prob.ndim - 1).unsqueeze(-1)",
        "π_k / π_θ in place of π_θ / π_k",
        "numerics/updater",
    ),
    Mutation(
        "ratio-not-capped",
        "objectives/policy_rows.py",
        "log_ratio = log_ratio + (cap.log() - log_ratio.detach()).clamp_max(0)",
        "pass",
        "max_importance_ratio is ignored",
        "objectives/trpo",
    ),
    Mutation(
        "mean-over-all-rows",
        "objectives/policy_rows.py",
        "weight = mask / count.clamp_min(1).to(log_prob.dtype)",
        "weight = mask / count.clamp_min(mask[..., 0, 0].numel()).to(log_prob.dtype)",
        "masked rows count in the number that a mean is divided by",
        "objectives/trpo",
    ),
    Mutation(
        "mask-missing",
        "objectives/policy_rows.py",
        "weight = mask / count.clamp_min(1).to(log_prob.dtype)",
        "weight = torch.ones_like(mask) / count.clamp_min(1).to(log_prob.dtype)",
        "padding counts in the KL (MARLlib, HARL)",
        "objectives/trpo",
    ),
    Mutation(
        "mean-over-agents",
        "objectives/policy_rows.py",
        "_equal_weight(rows.numel() if per_agent else log_prob.numel(),",
        "_equal_weight(log_prob.numel(),",
        "each agent's KL is divided by the number of agents",
        "numerics/updater",
    ),
    Mutation(
        "masked-rows-are-zeros",
        "objectives/policy_rows.py",
        "return torch.where(_with_ndim(keep, value.ndim), value, copied)",
        "return torch.where(_with_ndim(keep, value.ndim), value, 0 * copied)",
        "what stands for masked rows is no legal input of the policy",
        "objectives/policy_rows",
    ),
    Mutation(
        "matrix-as-vector",
        "torchrl_trpo/numerics/fisher.py",
        " or (row_dims is not None and max(ndims) > row_dims + 1)",
        "",
        "the curvature of a row's matrix is taken for that of a vector",
        "numerics/fisher",
    ),
    # The trust region
    Mutation(
        "surrogate-sign",
        "objectives/policy_region.py",
        "surrogate = (piece.rows.weight * gain).sum()",
        "surrogate = -(piece.rows.weight * gain).sum()",
        "the gradient of the loss in place of the surrogate's",
        "numerics/updater",
    ),
    Mutation(
        "kl-swapped",
        "objectives/policy_region.py",
        "kl_divergence(dist_k, dist, self._batch_dims).unsqueeze(-1))",
        "kl_divergence(dist, dist_k, self._batch_dims).unsqueeze(-1))",
        "KL(π_θ ‖ π_k) in place of KL(π_k ‖ π_θ)",
        "numerics/updater",
    ),
    Mutation(
        "factor-ignored",
        "objectives/policy_region.py",
        "gain = rows.factor * ratio * rows.advantage",
        "gain = ratio * rows.advantage",
        "HATRPO is not sequential (MARLlib's default)",
        "objectives/hatrpo",
    ),
    Mutation(
        "entropy-sign",
        "objectives/policy_region.py",
        "return ratio, gain + self._entropy_coeff",
        "return ratio, gain - self._entropy_coeff",
        "the entropy bonus is a penalty",
        "objectives/trpo",
    ),
    Mutation(
        "old-policy-in-factor",
        "objectives/policy_region.py",
        "torch.where(same, known, torch.nan)",
        "torch.where(same, known / known, torch.nan)",
        "the factor's ratio is that of the policy before the step: 1",
        "objectives/hatrpo",
    ),
    Mutation(
        "factor-of-rejected",
        "objectives/policy_region.py",
        "torch.where(self._accepted.unsqueeze(-1), ratio, 1.0)",
        "ratio",
        "the factor takes in ratios of agents whose step was rejected",
        "objectives/hatrpo",
    ),
    Mutation(
        "subsample-not-scaled",
        "objectives/policy_region.py",
        "sample.weight * (len(self._rows) / len(sample))",
        "sample.weight",
        "the Fisher matrix of a share of the rows is that share too small",
        "numerics/fisher",
    ),
    Mutation(
        "masked-subsample-not-scaled",
        "objectives/policy_region.py",
        "sample.weight / torch.where(total > 0, total, 1.0)",
        "sample.weight",
        "the same, where rows are masked",
        "numerics/fisher",
    ),
    Mutation(
        "last-chunk-alone",
        "objectives/policy_region.py",
        "total += flatten(slopes, len(self.indices))",
        "total = flatten(slopes, len(self.indices))",
        "the gradient is that of the last chunk of rows",
        "objectives/chunk_size::test_masked_rows_count_as_little_in_chunks",
    ),
    # The objectives
    Mutation(
        "loss-sign",
        "objectives/hatrpo.py",
        '{"loss_objective": -(factor * ratio * term).sum(),',
        '{"loss_objective": (factor * ratio * term).sum(),',
        "the loss is the surrogate itself",
        "objectives/hatrpo",
    ),
    Mutation(
        "logged-kl-swapped",
        "objectives/surrogate.py",
        "kl_if_exact(collected, dist, log_ratio.ndim - 1)",
        "kl_if_exact(dist, collected, log_ratio.ndim - 1)",
        "forward reports KL(π_θ ‖ π_k)",
        "objectives/trpo",
    ),
    Mutation(
        "normalised-over-agents",
        "objectives/policy_update.py",
        "if dim not in excluded]",
        "if dim in excluded]",
        "advantages are standardised over the agents in place of the rows",
        "objectives/trpo",
    ),
    Mutation(
        "padding-in-normalisation",
        "objectives/policy_update.py",
        "standardize(advantage, row_mask(loss, tensordict, advantage), dims, ranks)",
        "standardize(advantage, None, dims, ranks)",
        "masked rows move the mean of the advantages",
        "objectives/trpo",
    ),
    Mutation(
        "padding-in-statistics",
        "objectives/critic_loss.py",
        "targets = targets if mask is None else targets[mask].unsqueeze(-1)",
        "targets = targets",
        "targets of masked rows move the statistics of the value norm",
        "objectives/agent_gae",
    ),
    Mutation(
        "all-agents-for-one",
        "objectives/trpo.py",
        "agent_slice = slice(agent, agent + 1)",
        "agent_slice = slice(self.n_regions - 1 - agent, self.n_regions - agent)",
        "an agent's step is written into another's parameters",
        "objectives/hatrpo",
    ),
    Mutation(
        "popart-bias",
        "objectives/popart.py",
        "bias.mul_(scale).add_(mean - _mean(value_norm)).div_(value_norm.scale())",
        "bias.mul_(scale / value_norm.scale())",
        "PopArt's correction forgets the mean",
        "objectives/agent_gae",
    ),
    Mutation(
        "factor-not-accumulated",
        "objectives/hatrpo.py",
        "factor = factor * region.ratio()",
        "factor = region.ratio()",
        "an agent sees only what the one before it has changed",
        "objectives/hatrpo",
    ),
    Mutation(
        "factor-not-updated",
        "objectives/hatrpo.py",
        "factor = factor * region.ratio()",
        "region.ratio()",
        "M stays 1",
        "objectives/hatrpo",
    ),
    Mutation(
        "order-not-drawn",
        "objectives/agent_order.py",
        "drawn = torch.randperm(n_agents)",
        "drawn = torch.arange(n_agents)",
        "the random order is the same at each update",
        "objectives/hatrpo",
    ),
    Mutation(
        "index-is-position",
        "objectives/hatrpo.py",
        "agent=agent, index=index,",
        "agent=agent, index=(index + 1) % self.n_agents,",
        "an agent's statistics are in the row of its position in the order",
        "objectives/hatrpo",
    ),
    Mutation(
        "own-ratio-in-factor",
        "objectives/hatrpo.py",
        "torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], -1)",
        "after",
        "an agent's factor holds its own ratio",
        "objectives/hatrpo",
    ),
    Mutation(
        "gradient-through-factor",
        "objectives/hatrpo.py",
        "after = ratio.detach().cumprod(-1)",
        "after = ratio.cumprod(-1)",
        "M is not held constant",
        "objectives/hatrpo",
    ),
    # Several processes
    Mutation(
        "gradient-of-one-rank",
        "objectives/policy_region.py",
        "return self._ranks.sum_(total)\n\n    @torch.no_grad()\n    def evaluate",
        "return total\n\n    @torch.no_grad()\n    def evaluate",
        "each process takes the gradient of its own rows",
        "parallel/data_parallel::test_ranks_take_the_step_of_one_process",
    ),
    Mutation(
        "line-search-of-one-rank",
        "objectives/policy_region.py",
        "improvement, kl = self._ranks.sum_(torch.stack([improvement, kl]))",
        "improvement, kl = torch.stack([improvement, kl])",
        "each process accepts by its own rows",
        "parallel/data_parallel::test_ranks_take_the_step_of_one_process",
    ),
    Mutation(
        "order-of-each-rank",
        "objectives/agent_order.py",
        "(drawn if ranks.size == 1 else ranks.first_(drawn.to(device)))",
        "drawn",
        "processes update different agents at the same time",
        "parallel/data_parallel::test_ranks_begin_with_the_first_ones_parameters_and_agree_on_the_order",
    ),
    Mutation(
        "advantages-of-one-rank",
        "torchrl_trpo/numerics/statistics.py",
        "values - ranks.sum_(values.sum(dims, keepdim=True)) / count.clamp_min(1)",
        "values - ranks.size * values.sum(dims, keepdim=True) / count.clamp_min(1)",
        "advantages are centred by each process's own mean",
        "parallel/data_parallel::test_statistics_are_of_all_ranks",
    ),
    Mutation(
        "mean-of-means",
        "torchrl_trpo/parallel/minibatches.py",
        "(mean / whole).reshape(gradient.shape)",
        "(mean / count / ranks.size).reshape(gradient.shape)",
        "the critic's gradient is a mean over processes, not over rows",
        "parallel/data_parallel::test_twenty_updates_of_policy_and_critic_stay_together",
    ),
    # HAPPO
    Mutation(
        "happo-without-factor",
        "objectives/policy_member.py",
        "batch.set(self.tensor_keys.advantage, rows.factor * rows.advantage)",
        "batch.set(self.tensor_keys.advantage, rows.advantage)",
        "agents do not see what those before them have changed",
        "objectives/happo::test_it_is_plain_clip_ppo_in_a_loop_over_the_agents",
    ),
    Mutation(
        "happo-steps-on-nan",
        "objectives/clipped.py",
        "optimizer.found_inf = (~finite).float()\n",
        "pass\n",
        "a minibatch with a NaN makes the agent's parameters NaN",
        "objectives/happo::test_a_minibatch_with_a_nan_is_left_out",
    ),
    Mutation(
        "happo-next-agents-view",
        "objectives/policy_member.py",
        "self.parameters = agent_parameters(network, parameters, self.index)",
        "self.parameters = agent_parameters(network, parameters, max(self.index - 1, 0))",
        "an agent's steps are written into another's parameters",
        "objectives/happo::test_no_gradient_and_no_momentum_moves_another_agent",
    ),
    Mutation(
        "happo-old-copies",
        "objectives/policy_member.py",
        "if settings == self._settings:",
        "if self._settings:",
        "agents are trained with the modules that the policy had when the updater was made",
        "objectives/happo::test_a_policy_that_was_changed_is_the_one_that_is_updated",
    ),
    Mutation(
        "torn-trajectories",
        "objectives/agent_gae.py",
        "if torn.any() and self.lmbda:",
        "if False:",
        "in a flattened batch, the advantages of a trajectory leak into another",
        "objectives/agent_gae::test_the_advantages_of_one_trajectory_do_not_leak_into_another",
    ),
    Mutation(
        "critic-taken-for-raw",
        "objectives/critic_loss.py",
        "return own is self.value_norm or getattr",
        "return own is self.value_norm or False and getattr",
        "with an estimator outside of the loss, normalised values are normalised again",
        "objectives/agent_gae::test_normalised_values_keep_their_meaning_when_the_statistics_move",
    ),
    Mutation(
        "happo-unclipped-norm",
        "objectives/clipped.py",
        "clip_grad_norm_(member.trained, self.max_grad_norm)",
        "clip_grad_norm_(member.trained, float('inf'))",
        "gradients are not shortened",
        "objectives/happo::test_it_is_plain_clip_ppo_in_a_loop_over_the_agents",
    ),
    # Advantages and values
    Mutation(
        "done-for-terminated",
        "objectives/agent_gae.py",
        "data = tensordict.clone(False)",
        'data = tensordict.clone(False).set(("next", *path(keys.terminated)), tensordict["next", *path(keys.done)])',
        "episodes that ran out of time are not bootstrapped (CleanRL)",
        "objectives/central_critic",
    ),
    Mutation(
        "lambda-missing",
        "objectives/agent_gae.py",
        "super().__init__(**kwargs)",
        'super().__init__(**{**kwargs, "lmbda": 1.0})',
        "advantages are Monte Carlo returns",
        "objectives/central_critic",
    ),
    Mutation(
        "gamma-twice",
        "objectives/agent_gae.py",
        "super().__init__(**kwargs)",
        'super().__init__(**{**kwargs, "gamma": kwargs["gamma"] ** 2})',
        "the discount is squared",
        "objectives/central_critic",
    ),
    Mutation(
        "sum-for-mean",
        "objectives/agent_gae.py",
        'team = rewards.mean(-1) if self.team_reward == "mean" else rewards.sum(-1)',
        "team = rewards.sum(-1)",
        "the team's mean reward is the sum",
        "objectives/central_critic",
    ),
    Mutation(
        "next-value-normalised",
        "objectives/agent_gae.py",
        "next_value = next_value if known[1] else self.value_norm.denormalize(next_value)",
        "next_value = next_value",
        "the value at t+1 stays normalised",
        "objectives/central_critic",
    ),
    Mutation(
        "padding-terminates",
        "objectives/agent_gae.py",
        "data.set(terminated_key, terminated)",
        "data.set(terminated_key, terminated | ends.reshape(*ends.shape, *[1] * (done.ndim - ends.ndim)))",
        "the step before padding is not bootstrapped",
        "objectives/agent_gae",
    ),
    Mutation(
        "batch-is-a-ring",
        "objectives/step_values.py",
        "is_new.narrow(time_dim, -1, 1).fill_(True)",
        "is_new.narrow(time_dim, -1, 1).fill_(False)",
        "the last step of a batch is bootstrapped with the value of its first",
        "objectives/agent_gae",
    ),
    Mutation(
        "next-actions-of-now",
        "objectives/central_critic.py",
        "torch.where(mask, drawn.get(key), action.roll(-1, time_dim))",
        "torch.where(mask, drawn.get(key), action)",
        "the value at t+1 reads the others' actions at t (MARLlib)",
        "objectives/central_critic",
    ),
    Mutation(
        "next-actions-across-episodes",
        "objectives/central_critic.py",
        "ends = done.flatten(tensordict.batch_dims).any(-1)",
        "ends = torch.zeros_like(done.flatten(tensordict.batch_dims).any(-1))",
        "the value at an episode's end reads the actions of the next one's start",
        "objectives/central_critic",
    ),
    Mutation(
        "own-action-pooled",
        "objectives/central_critic.py",
        "(index.unsqueeze(-1) + 1 + index[:-1]) % n_agents",
        "(index.unsqueeze(-1) + index[:-1]) % n_agents",
        "an agent's value depends on its own action",
        "objectives/central_critic",
    ),
    # Statistics, critic, environment
    Mutation(
        "spread-biased",
        "torchrl_trpo/numerics/statistics.py",
        "/ (count - 1).clamp_min(1)).sqrt()",
        "/ count.clamp_min(1)).sqrt()",
        "the standard deviation is not that of PPOLoss",
        "objectives/trpo",
    ),
    Mutation(
        "rounding-is-spread",
        "torchrl_trpo/numerics/statistics.py",
        "spread <= rounding",
        "spread <= 0",
        "equal advantages are standardised to their rounding errors (HARL)",
        "numerics/updater",
    ),
    Mutation(
        "gradients-accumulate",
        "torchrl_trpo/training/critic_fit.py",
        "            optimizer.zero_grad()\n",
        "",
        "the critic's gradients add up over minibatches",
        "objectives/agent_gae",
    ),
    Mutation(
        "rows-by-rank",
        "torchrl_trpo/parallel/minibatches.py",
        "yield from kept[order].split(size)",
        "yield from order.split(size)",
        "the critic is fitted on rows that were to be left out",
        "objectives/agent_gae",
    ),
    Mutation(
        "explained-by-values",
        "torchrl_trpo/training/critic_fit.py",
        "variance(target - value, ranks) / variance(target, ranks)",
        "variance(target - value, ranks) / variance(value, ranks)",
        "the explained variance is a share of the wrong variance",
        "objectives/agent_gae",
    ),
    Mutation(
        "memory-not-reset",
        "torchrl_trpo/networks/recurrent.py",
        "torch.where(start, own, state)",
        "state",
        "a recurrent policy remembers the episode before",
        "networks/recurrent::test_sequences_are_the_steps[gru-shared]",
    ),
    Mutation(
        "return-summed",
        "torchrl_trpo/training/episodes.py",
        '"episode_return": returns.mean(-1).mean()',
        '"episode_return": returns.sum(-1).mean()',
        "the return averaged over agents is their sum",
        "envs/make::test_the_nine_particle_tasks[continuous-simple_adversary_v3]",
    ),
    Mutation(
        "episode-goes-on",
        "torchrl_trpo/training/episodes.py",
        '            running &= ~taken["next", "done"].squeeze(-1)\n',
        "",
        "an episode has the return of the one that follows it",
        "recipes/recipes::test_evaluation_plays_one_episode_per_environment",
    ),
    Mutation(
        "observations-recounted",
        "torchrl_trpo/envs/normalization.py",
        'self._begun = tensordict.get("_reset", None)',
        "self._begun = None",
        "where an episode begins, the observations of other environments count again",
        "envs/make::test_each_observation_counts_once_in_the_statistics[False-0.0]",
    ),
    Mutation(
        "dead-agent-counts-each-step",
        "torchrl_trpo/trainer/episode_return.py",
        "done = done & ~before",
        "pass",
        "the log of a Trainer has the return of a dead agent once for each step",
        "trainer/trainer::test_returns_of_episodes_that_ended",
    ),
    Mutation(
        "reset-leaks",
        "torchrl_trpo/envs/vmas.py",
        "steps)\n            snapshot.keep(~ended)",
        "steps)\n            snapshot.keep(torch.zeros_like(ended))",
        "environments that go on are reset with those that ended",
        "envs/vmas::test_each_scenario_is_reset_exactly[navigation]",
    ),
    Mutation(
        "clocks-reset",
        "torchrl_trpo/envs/vmas.py",
        "env.steps = torch.where(ended, env.steps, steps)",
        "pass",
        "the time limit of environments that go on starts anew",
        "envs/vmas::test_each_scenario_is_reset_exactly[navigation]",
    ),
    Mutation(
        "time-limit-terminates",
        "torchrl_trpo/envs/vmas.py",
        'entries |= {"done": terminated | truncated, "truncated": truncated}',
        'entries |= {"done": terminated | truncated, "terminated": terminated | truncated, "truncated": truncated}',
        "a time limit is reported as a termination, and so not bootstrapped",
        "envs/vmas::test_time_limits_are_truncations",
    ),
    Mutation(
        "place-given-away",
        "torchrl_trpo/kernels/stages.py",
        "if lane in kept and last_read[lane] == where",
        "if lane in kept",
        "a number is overwritten before the last part that reads it",
        "kernels/batch_function::test_gradient_of_a_network",
    ),
    Mutation(
        "written-is-constant",
        "torchrl_trpo/kernels/record.py",
        "if self._has_written or not self._constants",
        "if not self._constants",
        "a value that was written through a view is read once for all",
        "kernels/record",
    ),
    Mutation(
        "unread-draws",
        "torchrl_trpo/envs/reads.py",
        '"torchrl_trpo::draw_if", mutates_args=(), tags=_DRAWS',
        '"torchrl_trpo::draw_if", mutates_args=()',
        "random numbers that nothing reads are not counted: those that follow are drawn too early",
        "envs/compiled::test_numbers_are_vmas_s_after_as_many_tries_as_are_compiled",
    ),
    Mutation(
        "policy-moved-by-others",
        "torchrl_trpo/numerics/updater.py",
        "left = self._left.get(region, theta)",
        "left = theta",
        "an optimiser that moves the policy as well is not noticed",
        "numerics/updater::test_an_optimiser_that_moves_the_policy_too_is_told_once",
    ),
    Mutation(
        "one-chaotic-environment-excuses-all",
        "torchrl_trpo/envs/compiled.py",
        ".abs().amax(1, True) for other in others]",
        ".abs().amax() for other in others]",
        "an environment in which last bits decide lets all others differ",
        "envs/compiled::test_only_an_environment_that_last_bits_decide_may_differ",
    ),
    Mutation(
        "stale-constant",
        "torchrl_trpo/envs/flat_state.py",
        "return all(len(holder) == size and values(holder) == held for holder, values, held, size in self._watched)",
        "return True",
        "a compiled step does not notice that a constant has changed",
        "envs/compiled::test_what_someone_changes_counts",
    ),
    Mutation(
        "branch-unchecked",
        "torchrl_trpo/kernels/cpp.py",
        "    wrong |= wrong_here;\n",
        "",
        "a compiled step that would branch otherwise is not noticed",
        "envs/compiled::test_vmas_raises_its_own_errors",
    ),
    Mutation(
        "rows-of-another-block",
        "torchrl_trpo/kernels/batch_function.py",
        ".view(*shape, _STRIDE)[..., :size]",
        ".view(*shape, _STRIDE)[..., :_ROWS]",
        "the last block of a batch, which is not full, counts rows of the block before it",
        "kernels/batch_function::test_gradient_of_a_network",
    ),
    Mutation(
        "stale-critic-settings",
        "objectives/recorded_loss.py",
        "graphs, state = _kept.setdefault(loss.module, _Kept()).graphs, loss.state(settings)",
        "graphs, state = _kept.setdefault(loss.module, _Kept()).graphs, None",
        "a critic's loss whose settings have changed is fitted by the operations of before",
        "training/critic_gradient::test_recorded_again_when_a_setting_has_changed_that_the_first_minibatch_does_not_show",
    ),
    Mutation(
        "gradient-in-another-layout",
        "objectives/minibatch_gradient.py",
        "if gradient.stride() != parameter.stride() or memory in given:",
        "if memory in given:",
        "a fused optimiser, which reads memory in order, takes a gradient's numbers for those of other parameters",
        "training/critic_gradient::test_agents_with_critics_of_their_own",
    ),
    Mutation(
        "gradient-in-common",
        "objectives/minibatch_gradient.py",
        " or memory in given:",
        ":",
        "the gradient of two parameters is shortened twice",
        "objectives/compiled_clipped::test_what_cannot_be_compiled_says_why_and_is_right",
    ),
    Mutation(
        "constant-that-changes-unseen",
        "objectives/recorded_loss.py",
        "if self._compiled is not None and not self._compiled.gives(",
        "if False and not self._compiled.gives(",
        "what was compiled goes on after a constant in it has changed where nothing looks",
        "objectives/compiled_clipped::test_a_change_that_is_not_seen_is_found_by_the_first_minibatch",
    ),
    Mutation(
        "few-rows-are-as-many",
        "objectives/recorded_loss.py",
        "if not _are_close(self(shared, pack(one)), loss.results(shared, one)):",
        "if False:",
        "a last minibatch of one row takes the way of the others",
        "objectives/compiled_clipped::test_python_that_depends_on_rows_is_not_compiled",
    ),
    Mutation(
        "nan-is-recorded",
        "objectives/minibatch_gradient.py",
        "if all(each is None or bool(each.isfinite().all()) for each in expected):",
        "if True:",
        "a NaN in the first minibatch leaves all others of a run uncompiled",
        "objectives/compiled_clipped::test_a_minibatch_with_a_nan_is_left_out",
    ),
    Mutation(
        "stale-compiled-policy",
        "objectives/compiled_region.py",
        "if settings != self._settings:",
        "if self._settings is None:",
        "a policy whose settings have changed is updated by the functions of before",
        "objectives/compiled_region::test_settings_that_change_are_heeded",
    ),
    Mutation(
        "compiled-fisher-weight",
        "objectives/compiled_region.py",
        "shared, blocks = self._functions.shared_of(self, rows), Blocks(",
        "blocks = Blocks(",
        "the sampled rows of a compiled Fisher matrix have the weights of all rows",
        "objectives/compiled_region::test_compiled_update_is_the_update",
    ),
    Mutation(
        "padding-counts",
        "torchrl_trpo/kernels/writer.py",
        "| only({term(argument)}, valid)",
        "| {term(argument)}",
        "the rows that pad a buffer decide on a branch",
        "kernels/kernels::test_guards_are_about_all_rows_and_no_more",
    ),
    Mutation(
        "random-numbers-too-far",
        "torchrl_trpo/envs/compiled.py",
        "self._drawn.draw(masks, int(self.results.view(results, self._used)[0]))",
        "self._drawn.draw(masks)",
        "random numbers that a step might have needed are gone although it has not",
        "envs/compiled::test_traits_that_compile",
    ),
    Mutation(
        "draws-of-all-rows",
        "torchrl_trpo/kernels/buffers.py",
        "            elif number in masks:\n",
        "            elif number in ():\n",
        "random numbers for the environments of a mask are not those of VMAS",
        "envs/compiled::test_traits_that_compile",
    ),
    Mutation(
        "first-of-all-rows",
        "torchrl_trpo/envs/compiled.py",
        "first.copy_(tensor[mask.int().argmax()])",
        "first.copy_(tensor[0])",
        "the first row of a mask is that of all environments",
        "envs/compiled::test_traits_that_compile",
    ),
    Mutation(
        "broad-phase-of-one",
        "torchrl_trpo/kernels/aten.py",
        'holds = self._elementwise("or", near, any_near, kind="b")',
        "holds = near",
        "VMAS's broad phase, which is about all environments, is taken to be about each",
        "envs/compiled::test_the_broad_phase_decides_over_all_environments",
    ),
    Mutation(
        "reads-of-the-last",
        "torchrl_trpo/envs/flat_state.py",
        "        self.read |= read\n",
        "        self.read = set(read)\n",
        "what a compiled step reads may change, if the function that was compiled after it does not read it",
        "envs/compiled::test_what_someone_changes_counts",
    ),
    Mutation(
        "read-another-way",
        "torchrl_trpo/envs/tracing.py",
        "while path and path not in self._held_twice:",
        "while path:",
        "what no step reads by one attribute may change, although it reads it by another",
        "envs/compiled::test_what_someone_changes_counts",
    ),
    Mutation(
        "stale-shared-tensor",
        "torchrl_trpo/envs/flat_state.py",
        "            copy.copy_(tensor)  # someone",
        "            pass  # someone",
        "someone writes to a tensor of two attributes, and a compiled step reads the other",
        "envs/compiled::test_attributes_may_share_a_tensor_at_one_time_and_another_at_one",
    ),
    Mutation(
        "fresh-used-twice",
        "torchrl_trpo/envs/reset_pool.py",
        "            self._next += n_now\n",
        "",
        "environments that end at other times begin with the same state",
        "envs/compiled::test_ended_environments_take_fresh_ones",
    ),
    Mutation(
        "observed-twice",
        "torchrl_trpo/envs/compiled.py",
        "        if rows is not None and self.changes_state:",
        "        if rows is None and self.changes_state:",
        "a reset of others changes what an environment remembers",
        "envs/compiled::test_ended_environments_take_fresh_ones[traits1]",
    ),
    Mutation(
        "room-too-early",
        "torchrl_trpo/kernels/scratch.py",
        " and self._last.get(block, index) == index:",
        ":",
        "results make room for others while something still reads them",
        "kernels/batch_function::test_gradient_of_a_network",
    ),
    Mutation(
        "stored-within",
        "torchrl_trpo/kernels/scratch.py",
        "for block in readers if block not in stores and",
        "for block in readers if",
        "results that are written are not there, since they are made in the loop of what reads them",
        "kernels/batch_function::test_many_results_that_are_reduced_and_read_besides",
    ),
    Mutation(
        "padding-kept",
        "torchrl_trpo/kernels/writer.py",
        "+ i, only({term(value)}, valid))",
        "+ i, {term(value)})",
        "what is behind the rows of a buffer is not zero, so that the last bit of a run depends on old memory",
        "kernels/kernels::test_a_row_is_computed_as_pytorch_computes_the_batch",
    ),
    Mutation(
        "old-resets",
        "torchrl_trpo/envs/reset_pool.py",
        "return state.reset_problem is None and all(",
        "return all(",
        "environments that were reset before a change take the place of those that end",
        "envs/compiled_resets",
    ),
    Mutation(
        "numbers-are-constants",
        "torchrl_trpo/envs/rollout_functions.py",
        "id(args[0]) in self._own",
        "id(args[0]) in ()",
        "a number that a policy reads of a buffer is what it was when it was compiled",
        "envs/compiled_policies",
    ),
    Mutation(
        "rollout-not-current",
        "torchrl_trpo/envs/fused_rollout.py",
        "self._find_settings() == self._settings",
        "True",
        "compiled rollouts do not notice that a transform or the policy has other settings",
        "envs/compiled_collector::test_what_has_changed_is_compiled_anew",
    ),
    Mutation(
        "draws-left-behind",
        "torchrl_trpo/envs/many_steps.py",
        "  set(p.act.in + p.first_draw, p.draws + n_steps * p.n_draws, p.n_draws);\n",
        "",
        "after steps that were taken in one call, the policy acts by random numbers of these",
        "envs/compiled_collector::test_a_reset_that_draws_a_goal_for_all_is_in_it",
    ),
    Mutation(
        "draws-of-steps-not-taken",
        "torchrl_trpo/envs/many_steps.py",
        "if n_taken < n_steps:  # the others draw again",
        "if False:",
        "random numbers that were drawn for steps that are not taken are gone",
        "envs/compiled_collector::test_a_reset_that_draws_a_goal_for_all_is_in_it",
    ),
    Mutation(
        "pool-used-twice",
        "torchrl_trpo/envs/many_steps.py",
        "env.pool.taken(plan.next)",
        "env.pool.taken(0)",
        "two environments that end are replaced by the same fresh one",
        "envs/compiled_collector::test_batches_are_those_of_torchrl",
    ),
    Mutation(
        "read-is-forgotten",
        "torchrl_trpo/envs/many_steps.py",
        "p.read_changes_state && k < K",
        "false && k < K",
        "what reading the entries changes in fresh environments is lost",
        "envs/compiled_collector::test_steps_that_vmas_takes_are_in_it",
    ),
    Mutation(
        "parameters-of-a-list",
        "torchrl_trpo/envs/torchrl_step.py",
        "if isinstance(module, TensorDictParams):",
        "if False:",
        "a compiled rollout acts with parameters that to_module has replaced",
        "envs/compiled_collector::test_parameters_that_to_module_puts_there_are_read",
    ),
    Mutation(
        "policy-without-memory",
        "torchrl_trpo/networks/recurrent.py",
        "if not (recurrent_mode() or is_init.is_meta or bool(is_init.all())):",
        "if False:",
        "a recurrent policy acts without its memory where an environment does not carry it",
        "networks/recurrent::test_an_environment_that_does_not_carry_the_states_is_refused",
    ),
    Mutation(
        "critic-without-memory",
        "objectives/critic_loss.py",
        "if not recurrent_mode():",
        "if False:",
        "the loss of a recurrent critic is that of one without memory",
        "networks/recurrent::test_the_loss_of_a_recurrent_critic_is_that_of_sequences",
    ),
    Mutation(
        "networks-of-a-copy",
        "objectives/functional.py",
        "if isinstance(module, TensorDictParams) and id(module) not in memo:",
        "if False:",
        "the estimator of a copied loss evaluates a critic that does not learn",
        "objectives/central_critic::test_the_networks_of_a_copied_loss_are_those_that_it_trains",
    ),
    Mutation(
        "advantages-of-another-group",
        "torchrl_trpo/training/estimators.py",
        "    check_own_entries(groups)\n",
        "",
        "two groups with the default keys train on the second one's advantages",
        "training/groups",
    ),
    Mutation(
        "held-buffer-reused",
        "torchrl_trpo/envs/fused_rollout.py",
        "self._spares += [each for each in unused if each is not self._held]",
        "self._spares += [*unused]",
        "a rollout writes into tensors that were read from VMAS's objects before",
        "envs/compiled_collector::test_vmas_objects_hold_what_the_batch_ends_with",
    ),
)


def main() -> None:
    """Makes the mistakes one after the other and prints which test noticed each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", choices=[m.name for m in MUTATIONS], default=[])
    parser.add_argument("--list", action="store_true", help="print the mistakes and end")
    arguments = parser.parse_args()
    mutations = [mutation for mutation in MUTATIONS if not arguments.only or mutation.name in arguments.only]
    if arguments.list:
        print("\n".join(f"{m.name:<28} {m.file:<36} {m.meaning}" for m in mutations))
        return
    with tempfile.TemporaryDirectory() as folder:
        survived = _check(Path(folder), mutations)
    if survived:
        sys.exit(f"not noticed: {', '.join(survived)}")


def _check(copy: Path, mutations: Sequence[Mutation]) -> list[str]:
    """Prints the table row by row; returns what survived."""
    _copy_repository(copy)
    for mutation in mutations:
        count = (copy / mutation.file).read_text().count(mutation.old)
        if count != 1:
            sys.exit(f"{mutation.name}: its text is found {count} times in {mutation.file}, not once:\n{mutation.old}")
    for name in ("torchrl.collectors", "torchrl.envs", "torchrl.objectives"):
        importlib.import_module(name)
    start = time.perf_counter()
    tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.test_ids))
    if (failed := _first_failure(copy, tests)) is not None:
        sys.exit(f"without any mistake the copy fails {failed}")
    print(f"{'none':<28} {'passes ' + ', '.join(tests)} ({time.perf_counter() - start:.0f} s)\n", flush=True)
    print(f"{'mistake':<28} {'seconds':>7}  noticed by")
    survived = []
    for mutation in mutations:
        file, begin = copy / mutation.file, time.perf_counter()
        text = file.read_text()
        file.write_text(text.replace(mutation.old, mutation.new))
        failed = _first_failure(copy, mutation.test_ids)
        others = failed is None
        if others:
            failed = _first_failure(copy, ["tests"], without=mutation.test_ids)
        file.write_text(text)
        if others and failed is not None and _first_failure(copy, [failed]) is not None:
            sys.exit(f"without any mistake the copy fails {failed}")
        survived += [mutation.name] if failed is None else []
        print(f"{mutation.name:<28} {time.perf_counter() - begin:>7.0f}  {failed or 'NO TEST'}", flush=True)
    print(f"\n{len(mutations) - len(survived)} of {len(mutations)} noticed, {time.perf_counter() - start:.0f} s")
    return survived


def _copy_repository(copy: Path) -> None:
    """Copies what git tracks or would, and makes it one package, as the installed one is."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    for part in ("objectives", "recipes"):
        (copy / "torchrl_trpo" / part).symlink_to(Path("..") / part)


def _first_failure(copy: Path, tests: Sequence[str], *, without: Sequence[str] = ()) -> str | None:
    """The first test that fails in the copy, or None."""
    deselected = [word for test in without for word in ("--deselect", test)]
    # An end after TIME_LIMIT is told from a failure here, not by the suite's limit for a test.
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0", *tests, *deselected]
    with tempfile.TemporaryFile("w+") as output:
        child = multiprocessing.get_context("fork").Process(target=_run, args=(copy, arguments, output.fileno()))
        child.start()
        child.join(TIME_LIMIT)
        if child.is_alive():
            child.kill()
            return f"(no end after {TIME_LIMIT} s)"
        output.seek(0)
        text = output.read()
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", text, re.MULTILINE)
    if child.exitcode == 0:
        return None
    if child.exitcode == 1 and failed:
        return failed[1]
    sys.exit(f"the tests {' '.join(tests)} do not run:\n{text[-3000:]}")


def _run(copy: Path, arguments: list[str], output: int) -> None:
    """Runs pytest in a fork that has imported TorchRL, which takes longer than most tests, and nothing of ours."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    # Without bytecode: a file written twice within a second, at the same length, would run as it was before.
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in {"", str(ROOT)})]
    for name in [name for name in sys.modules if name.partition(".")[0] in {"tests", "torchrl_trpo"}]:
        del sys.modules[name]
    for name in ("torchrl_trpo", "torchrl_trpo.objectives", "torchrl_trpo.recipes", "tests.cases"):
        spec = importlib.util.find_spec(name)
        if spec is None or not Path(str(spec.origin)).resolve().is_relative_to(copy.resolve()):
            raise ImportError(f"{name} is not imported from the copy: {spec}")
    sys.exit(int(pytest.main(arguments)))


def _test_id(name: str) -> str:
    file, *test = name.split("::")
    folder, _, stem = file.rpartition("/")
    return "::".join([str(Path("tests", folder, f"test_{stem}.py")), *test])


if __name__ == "__main__":
    main()
