"""What is wrong with a run: why policy steps are rejected, and which symptoms its metrics show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tensordict import TensorDictBase
from torch import Tensor

from torchrl_trpo.keys import GroupKeys
from torchrl_trpo.parallel.ranks import ALONE, Ranks
from torchrl_trpo.reporting.record import RunRecord


class Threshold:
    """The numbers that separate a healthy run from an ill one. Warnings, symptoms and plots use the same ones."""

    CG_RESIDUAL = 0.1
    """Relative to the gradient; above it, the conjugate gradient has not converged."""
    CG_RESIDUAL_WITH_FULL_STEPS = 0.3
    """The same for steps that the line search accepts in full, ``step_fraction`` at least ``FULL_STEP``."""
    FULL_STEP = 0.9
    ACCEPTED = 0.5
    """The share of regions whose step is accepted; below it, steps are rejected."""
    KL = 1e-4
    """In nats; below it, the policy hardly moves."""
    KL_OVER_MAX_KL = 0.5
    """Of accepted steps; below it, they end far inside the trust region."""
    FACTOR_STD = 1.0
    """Of the sequential factor before the last agent; above it, the agents' steps are too large for each other."""
    CLIP_FRACTION = 0.4
    """The share of rows; above it, most rows are clipped."""
    EXPLAINED_VARIANCE = 0.05
    """Below it, the critic explains nothing."""
    ADVANTAGE_SPREAD = 1e-6
    """Standard deviation over largest advantage; below it, the advantages are all the same."""
    LARGEST_ADVANTAGE = 30.0
    """In standard deviations; above it, single rows dominate."""
    CURVATURE_OVER_DAMPING = 1.1
    """Below it, the curvature along the step is the damping alone."""


PATIENCE = 10
"""The number of rejections in a row that are reported first; they are reported again whenever it has doubled."""

ROWS = 10
"""The number of last iterations whose mean decides on a symptom."""
_ENOUGH_ROWS = 20
"""A younger run has no symptoms: its start says little about its course."""


class RejectionWatch:
    """Counts each trust region's rejected steps in a row, and reports the likely causes.

    Args:
        groups: the groups of agents.
        max_kl: the trust region's radius; None for updates without one, which reject non-finite steps only.
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
        """Restores the counts that :meth:`state_dict` gave."""
        self._in_a_row = list(state_dict["in_a_row"])

    def update(self, data: TensorDictBase, stats: TensorDictBase) -> list[str]:
        """Counts the rejections of an update.

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
        start = f"{name}: the last {self._in_a_row[region]} {what}. Likely:"
        if not advantage.numel():
            return f"{start} it takes part in no row of the batch, its mask is false in all of them."
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
        return f"{start} {causes}. ({', '.join(f'{key}={value:.3g}' for key, value in figures.items())})"

    def _region(self, region: int, data: TensorDictBase) -> tuple[str, Tensor]:
        """A region's name, and its advantages where its mask counts."""
        per_agent = len(self._in_a_row) == sum(keys.n_agents for keys in self._groups)
        for keys in self._groups:
            n_regions = keys.n_agents if per_agent else 1
            if region >= n_regions:
                region -= n_regions
                continue
            advantage = data.get(keys.advantage).squeeze(-1)
            counts = keys.counts(data, advantage)
            name = "The policy" if keys.group is None else f"Group {keys.group!r}"
            if per_agent and keys.group is not None:
                name = f"{name}, agent {region}"
                advantage, counts = advantage[..., region], counts[..., region]
            return name, self._ranks.concat(advantage[counts])
        raise IndexError(region)


def _is_due(count: int) -> bool:
    return count >= PATIENCE and count % PATIENCE == 0 and math.log2(count // PATIENCE).is_integer()


def _causes(figures: dict[str, float], damping: float | None) -> list[str]:
    finite = all(math.isfinite(figures[key]) for key in ("grad_norm", "advantage_mean", "advantage_largest"))
    if not finite or damping is None:
        return ["the batch or the policy's output is not finite; non_finite=stop names where it comes from"]
    spread, largest = figures["advantage_std"], figures["advantage_largest"]
    if figures["grad_norm"] == 0 or spread <= Threshold.ADVANTAGE_SPREAD * largest:
        return [
            "the advantages are all the same, so that no action is better than another: do the rewards differ? Raise "
            "train.frames_per_batch, or look at critic.lr and gamma"
        ]
    causes = []
    if figures["cg_residual"] > Threshold.CG_RESIDUAL:
        causes.append(
            f"the conjugate gradient has not converged (cg_residual should be below {Threshold.CG_RESIDUAL}): raise "
            "updater.cg_iters or updater.damping"
        )
    if not figures["expected_improvement"] > 0:
        causes.append("the Fisher matrix is not positive along the step: raise updater.damping")
    elif figures["curvature"] < Threshold.CURVATURE_OVER_DAMPING * damping:
        causes.append(
            "the policy's distribution hardly changes along the step (curvature is the damping alone): the policy may "
            "be saturated, lower updater.damping or raise entropy_coeff"
        )
    if largest > Threshold.LARGEST_ADVANTAGE * spread:
        causes.append(
            "single rows dominate the advantages (advantage_largest is above "
            f"{Threshold.LARGEST_ADVANTAGE:.0f} advantage_std): scale or clip rewards"
        )
    return causes or [
        "the linear model does not hold up to the region's border, or the Fisher matrix is estimated on too few rows: "
        "lower updater.max_kl, raise updater.max_backtracks, updater.fisher_subsample or train.frames_per_batch"
    ]


@dataclass(frozen=True)
class Symptom:
    """A sign in the metrics that a run is not well.

    Attributes:
        name: the heading in ``docs/not-learning.md``.
        figures: the numbers that show it.
    """

    name: str
    figures: str


def find_symptoms(record: RunRecord) -> list[Symptom]:
    """Looks for symptoms in the last iterations of a run.

    Args:
        record: the run.

    Returns:
        The symptoms, in the order of ``docs/not-learning.md``; none for a run of fewer than twenty iterations.
    """
    if len(record.column("frames")) < _ENOUGH_ROWS:
        return []
    found = []
    for name, columns, is_ill in _SYMPTOMS:
        values = [record.recent(column, ROWS) for column in columns]
        if is_ill(record.max_kl, *values):
            figures = ", ".join(f"{column} {value:.3g}" for column, value in zip(columns, values, strict=True))
            found.append(Symptom(name, f"{figures}, mean of the last {ROWS} iterations."))
    return found


def _has_not_converged(max_kl: float | None, cg_residual: float, step_fraction: float) -> bool:
    full = not step_fraction < Threshold.FULL_STEP
    return cg_residual > (Threshold.CG_RESIDUAL_WITH_FULL_STEPS if full else Threshold.CG_RESIDUAL)


def _hardly_moves(max_kl: float | None, kl: float, accepted: float) -> bool:
    return accepted >= Threshold.ACCEPTED and kl < Threshold.KL


def _is_far_inside(max_kl: float | None, kl: float, accepted: float) -> bool:
    moves = accepted >= Threshold.ACCEPTED and kl >= Threshold.KL
    return max_kl is not None and moves and kl < Threshold.KL_OVER_MAX_KL * accepted * max_kl


_SYMPTOMS: tuple[tuple[str, tuple[str, ...], Callable[..., bool]], ...] = (
    # Name, columns, and whether the columns' means, given after max_kl, show it. A NaN shows nothing.
    ("No episode ends", ("episode_return",), lambda _, value: math.isnan(value)),
    ("Steps are rejected", ("accepted",), lambda _, value: value < Threshold.ACCEPTED),
    ("The conjugate gradient has not converged", ("cg_residual", "step_fraction"), _has_not_converged),
    ("The policy hardly moves", ("kl", "accepted"), _hardly_moves),
    ("Steps end far inside the trust region", ("kl", "accepted"), _is_far_inside),
    (
        "The agents' steps are too large for each other",
        ("factor_std", "kl"),
        lambda _, factor_std, kl: factor_std > Threshold.FACTOR_STD,
    ),
    ("Most rows are clipped", ("clip_fraction", "kl"), lambda _, clipped, kl: clipped > Threshold.CLIP_FRACTION),
    (
        "The critic explains nothing",
        ("explained_variance",),
        lambda _, value: value < Threshold.EXPLAINED_VARIANCE,
    ),
)
