"""Our updates against the textbook's, once both are seen to give the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torchrl.modules import IndependentNormal, NormalParamExtractor

from tests.benchmarks import textbook
from tests.benchmarks.problems import N_ACT, N_AGENTS, N_OBS, ROWS, kept, kept_step, policy_and_data
from tests.benchmarks.timing import medians
from tests.benchmarks.update import DEFAULT_SUBSAMPLE, fisher_product
from torchrl_trpo import TrustRegionUpdater
from torchrl_trpo.objectives import HATRPOSequentialObjective, TRPOLoss

TOLERANCE = 1e-3
"""How far our step and the textbook's may be apart, relative to the step's length, in float32."""


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """The textbook's costs as multiples of ours, for a shared policy and for HATRPO.

    Args:
        repetitions: of each task.
        quick: unused.

    Returns:
        Figures by label.
    """
    repetitions = min(repetitions, 3)
    results = {}
    for name, pair in {"shared policy": shared_pair(), "HATRPO": hatrpo_pair()}.items():
        apart = pair.distance()
        if apart > TOLERANCE:
            raise RuntimeError(f"{name}: our step and the textbook's differ by {apart:.1e} of their length.")
        parameters = [parameter for policy in pair.policies for parameter in policy.parameters()]
        theirs = textbook.fisher_product(pair.policies[0], pair.batches[0])
        vector = torch.randn_like(parameters_to_vector(pair.policies[0].parameters()))
        region = {} if len(pair.policies) == 1 else {"agent": 0}
        cost = medians(
            {
                "their_fisher": lambda theirs=theirs, vector=vector: theirs(vector),
                "fisher": fisher_product(pair.loss, pair.loss.policy_rows(pair.data), **region),
                "their_update": kept(parameters, pair.step),
                "exact": kept_step(TrustRegionUpdater(pair.objective), pair.data),
                "default": kept_step(TrustRegionUpdater(pair.objective, fisher_subsample=DEFAULT_SUBSAMPLE), pair.data),
            },
            repetitions,
        )
        results |= {
            f"{name}: distance of our step from the textbook's, relative": apart,
            f"{name}: Fisher product, textbook / ours": cost["their_fisher"] / cost["fisher"],
            f"{name}: update, textbook / ours with all rows in F": cost["their_update"] / cost["exact"],
            f"{name}: update, textbook / ours with 1/10 of the rows in F": cost["their_update"] / cost["default"],
        }
    return results


@dataclass
class Pair:
    """The same problem for both.

    Attributes:
        objective: ours.
        loss: the loss behind it.
        data: the batch.
        policies: copies of the policy as plain modules, one for each region.
        batches: their batches.
        step: the textbook's update of them.
    """

    objective: TRPOLoss | HATRPOSequentialObjective
    loss: TRPOLoss
    data: TensorDict
    policies: Sequence[nn.Module]
    batches: Sequence[textbook.Batch]
    step: Callable[[], object]

    def distance(self) -> float:
        """How far the parameters after one update of each are apart, relative to the length of our step."""
        before = self._theirs()
        TrustRegionUpdater(self.objective).step(self.data)
        self.step()
        ours, theirs = self._ours(), self._theirs()
        return float((ours - theirs).norm() / (ours - before).norm())

    def _ours(self) -> Tensor:
        copies = [_plain_policy(self.loss, agent) for agent in _agents(self.loss)]
        return parameters_to_vector([p for copy in copies for p in copy.parameters()]).detach()

    def _theirs(self) -> Tensor:
        return parameters_to_vector([p for policy in self.policies for p in policy.parameters()]).detach()


def shared_pair(rows: int = ROWS) -> Pair:
    """One policy for all agents.

    Args:
        rows: the number of environment steps.

    Returns:
        The pair.
    """
    loss, data = policy_and_data(share_params=True, rows=rows, distribution=IndependentNormal)
    policy, batch = _plain_policy(loss, None), _plain_batch(data, slice(None))
    return Pair(loss, loss, data, [policy], [batch], lambda: textbook.trpo_step(policy, batch))


def hatrpo_pair(rows: int = ROWS) -> Pair:
    """A policy each, updated in sequence.

    Args:
        rows: the number of environment steps.

    Returns:
        The pair.
    """
    loss, data = policy_and_data(share_params=False, rows=rows, distribution=IndependentNormal)
    policies = [_plain_policy(loss, agent) for agent in range(N_AGENTS)]
    batches = [_plain_batch(data, agent) for agent in range(N_AGENTS)]
    objective = HATRPOSequentialObjective(loss, agent_order="fixed")
    return Pair(objective, loss, data, policies, batches, lambda: textbook.hatrpo_step(policies, batches))


def _agents(loss: TRPOLoss) -> Sequence[int | None]:
    return [None] if loss.trust_region == "shared" else range(loss.n_regions)


def _plain_policy(loss: TRPOLoss, agent: int | None) -> nn.Module:
    """A copy of our policy, or of one agent's, as a plain module."""
    layers = [nn.Linear(N_OBS, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2 * N_ACT)]
    policy = nn.Sequential(*layers, NormalParamExtractor())
    ours = [value for _, value in sorted(loss.actor_parameters.flatten_keys().items()) if value.requires_grad]
    ours = ours if agent is None else [value[agent] for value in ours]
    theirs = [value for _, value in sorted(policy.named_parameters())]
    for value, plain in zip(ours, theirs, strict=True):
        plain.data = value.detach().clone()
    return policy


def _plain_batch(data: TensorDict, agent: int | slice) -> textbook.Batch:
    rows = data.reshape(-1)
    entries = [("agents", "observation"), ("agents", "action"), ("agents", "action_log_prob"), "advantage"]
    observation, action, log_prob, advantage = (rows[entry][:, agent].contiguous() for entry in entries)
    return textbook.Batch(observation, action, log_prob, advantage.squeeze(-1))
