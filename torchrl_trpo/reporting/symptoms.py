"""What the metrics of a run complain of, by the headings of ``docs/not-learning.md``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torchrl_trpo.reporting.record import RunRecord

ROWS = 10
"""The iterations that the numbers are means over, the last ones."""
_OLD_ENOUGH = 20
"""The iterations that a run needs, so that its begin is not taken for its course."""


@dataclass(frozen=True)
class Symptom:
    """Something that should not be.

    Attributes:
        name: the heading in ``docs/not-learning.md``.
        told: the numbers that say so.
    """

    name: str
    told: str


def find_symptoms(record: RunRecord) -> list[Symptom]:
    """Looks at the last iterations of a run.

    Args:
        record: the run.

    Returns:
        What should not be, in the order of ``docs/not-learning.md``; nothing of a run that is younger than twenty
        iterations.
    """
    if len(record.column("frames")) < _OLD_ENOUGH:
        return []
    found = []
    for name, columns, is_ill in _SYMPTOMS:
        values = [record.recent(column, ROWS) for column in columns]
        if is_ill(record, *values):
            told = ", ".join(f"{column} {value:.3g}" for column, value in zip(columns, values, strict=True))
            found.append(Symptom(name, f"{told}, mean of the last {ROWS} iterations."))
    return found


def _no_episodes(record: RunRecord, episode_return: float) -> bool:
    return math.isnan(episode_return)


def _steps_are_rejected(record: RunRecord, accepted: float) -> bool:
    return accepted < 0.5


def _not_converged(record: RunRecord, cg_residual: float, step_fraction: float) -> bool:
    return cg_residual > 0.3 or (cg_residual > 0.1 and step_fraction < 0.9)


def _policy_stays(record: RunRecord, kl: float, accepted: float) -> bool:
    return accepted >= 0.5 and kl < 1e-4


def _far_inside(record: RunRecord, kl: float, accepted: float) -> bool:
    return record.max_kl is not None and accepted >= 0.5 and 1e-4 <= kl < 0.5 * accepted * record.max_kl


def _agents_pull_apart(record: RunRecord, factor_std: float, kl: float) -> bool:
    return factor_std > 1


def _clipped(record: RunRecord, clip_fraction: float, kl: float) -> bool:
    return clip_fraction > 0.4


def _critic_explains_nothing(record: RunRecord, explained_variance: float) -> bool:
    return explained_variance < 0.05


_SYMPTOMS: tuple[tuple[str, tuple[str, ...], Callable[..., bool]], ...] = (
    ("No episode ends", ("episode_return",), _no_episodes),
    ("Steps are rejected", ("accepted",), _steps_are_rejected),
    ("The conjugate gradient has not converged", ("cg_residual", "step_fraction"), _not_converged),
    ("The policy hardly moves", ("kl", "accepted"), _policy_stays),
    ("Steps end far inside the trust region", ("kl", "accepted"), _far_inside),
    ("The agents' steps are too large for each other", ("factor_std", "kl"), _agents_pull_apart),
    ("Most rows are clipped", ("clip_fraction", "kl"), _clipped),
    ("The critic explains nothing", ("explained_variance",), _critic_explains_nothing),
)
