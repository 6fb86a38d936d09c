"""Why policy steps are rejected, when they are again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from torchrl_trpo.keys import GroupKeys
from torchrl_trpo.parallel.ranks import ALONE, Ranks

PATIENCE = 10
"""The number of rejections in a row that are reported; they are again when it has doubled."""

LARGEST_CG_RESIDUAL = 0.1
"""What the conjugate gradient may leave of the gradient; above it has not converged."""


class RejectionWatch:
    """Counts each trust region's rejected steps in a row, and says what they are likely to come from.

    Args:
        groups: the groups of agents.
        max_kl: the trust region's radius; None for updates without one, whose steps are rejected for what is not
            finite alone.
        damping: what is added to the Fisher matrix's diagonal.
        ranks: the processes whose rows belong together. Default: this one alone.
    """

    def __init__(
        self,
        groups: Sequence[GroupKeys],
        *,
        max_kl: float | None,
        damping: float | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._groups = groups
        self._ranks = ranks
        self._max_kl = max_kl
        self._damping = damping
        self._in_a_row: list[int] = []

    def state_dict(self) -> dict[str, list[int]]:
        """The rejections in a row, by region."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, list[int]]) -> None:
        """Goes on counting from what :meth:`state_dict` gave."""
        self._in_a_row = list(state_dict["in_a_row"])

    def see(self, data: TensorDictBase, stats: TensorDictBase) -> list[str]:
        """Takes note of an update.

        Args:
            data: the batch, with advantages.
            stats: what the updater returned, ``[n_regions]``.

        Returns:
            A report for each region whose rejections have become many.
        """
        accepted = stats["accepted"].tolist()
        before = self._in_a_row or [0] * len(accepted)
        self._in_a_row = [0 if ok else count + 1 for ok, count in zip(accepted, before, strict=True)]
        due = [region for region, count in enumerate(self._in_a_row) if _is_due(count)]
        return [self._report(region, data, stats[region]) for region in due]

    def _report(self, region: int, data: TensorDictBase, stats: TensorDictBase) -> str:
        name, advantage = self._region(region, data)
        what = "policy steps were all rejected" if self._max_kl is not None else "updates all left steps out"
        told = f"{name}: the last {self._in_a_row[region]} {what}. Likely:"
        if not advantage.numel():
            return f"{told} it takes part in no row of the batch, its mask is false in all of them."
        figures = {"grad_norm": float(stats["grad_norm"])}
        if self._max_kl is not None:
            figures |= {key: float(stats[key]) for key in ("cg_residual", "expected_improvement")}
            # At the solution of (F + λI)x = g the full step's gᵀβx is sqrt(2δ gᵀx): the matrix along the gradient.
            along = figures["expected_improvement"] ** 2 / (2 * self._max_kl)
            figures["curvature"] = figures["grad_norm"] ** 2 / along if along > 0 else math.nan
        figures["advantage_mean"] = float(advantage.mean())
        figures["advantage_std"] = float(advantage.std())
        figures["advantage_largest"] = float(advantage.abs().max())
        causes = "; ".join(_causes(figures, self._damping))
        return f"{told} {causes}. ({', '.join(f'{key}={value:.3g}' for key, value in figures.items())})"

    def _region(self, region: int, data: TensorDictBase) -> tuple[str, Tensor]:
        """A region's name and its advantages, without those that do not count."""
        per_agent = len(self._in_a_row) == sum(keys.n_agents for keys in self._groups)
        for keys in self._groups:
            n_regions = keys.n_agents if per_agent else 1
            if region >= n_regions:
                region -= n_regions
                continue
            advantage = data.get(keys.advantage).squeeze(-1)
            counts = torch.ones_like(advantage, dtype=torch.bool) if keys.mask is None else data.get(keys.mask)
            name = "The policy" if keys.group is None else f"Group {keys.group!r}"
            if per_agent and keys.group is not None:
                name = f"{name}, agent {region}"
                advantage, counts = advantage[..., region], counts.reshape(advantage.shape)[..., region]
            return name, self._ranks.concat(advantage[counts.reshape(advantage.shape)])
        raise IndexError(region)


def _is_due(count: int) -> bool:
    return count >= PATIENCE and count % PATIENCE == 0 and math.log2(count // PATIENCE).is_integer()


def _causes(figures: dict[str, float], damping: float | None) -> list[str]:
    finite = all(math.isfinite(figures[key]) for key in ("grad_norm", "advantage_mean", "advantage_largest"))
    if not finite or damping is None:
        return ["the batch or the policy's output is not finite; non_finite=stop names where it comes from"]
    spread = figures["advantage_std"]
    if figures["grad_norm"] == 0 or spread <= 1e-6 * figures["advantage_largest"]:
        return [
            "the advantages are all the same, so that no action is better than another: do the rewards differ? Raise "
            "train.frames_per_batch, or look at critic.lr and gamma"
        ]
    causes = []
    if figures["cg_residual"] > LARGEST_CG_RESIDUAL:
        causes.append(
            f"the conjugate gradient has not converged (cg_residual should be below {LARGEST_CG_RESIDUAL}): raise "
            "updater.cg_iters or updater.damping"
        )
    if not figures["expected_improvement"] > 0:
        causes.append("the Fisher matrix is not positive along the step: raise updater.damping")
    elif figures["curvature"] < 1.1 * damping:
        causes.append(
            "the policy's distribution hardly changes along the step (curvature is the damping alone): the policy may "
            "be saturated, lower updater.damping or raise entropy_coeff"
        )
    if figures["advantage_largest"] > 30 * spread:
        causes.append(
            "single rows dominate the advantages (advantage_largest is above 30 advantage_std): scale or clip rewards"
        )
    return causes or [
        "the linear model does not hold up to the region's border, or the Fisher matrix is estimated on too few rows: "
        "lower updater.max_kl, raise updater.max_backtracks, updater.fisher_subsample or train.frames_per_batch"
    ]
