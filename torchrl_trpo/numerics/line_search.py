"""The backtracking line search of TRPO (Schulman et al. 2015, appendix C), for several regions at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LineSearchResult(NamedTuple):
    """The result of a line search, for each of ``n`` regions.

    Attributes:
        accepted: whether a step was accepted, bool ``[n]``.
        fraction: the accepted fraction of the full step, ``[n]``; 0 where none was.
        improvement: the improvement at that fraction, ``[n]``; 0 where none was accepted.
        kl: the KL divergence at that fraction in nats, ``[n]``; 0 where none was accepted.
    """

    accepted: Tensor
    fraction: Tensor
    improvement: Tensor
    kl: Tensor


def backtrack(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    expected_improvement: Tensor,
    *,
    max_kl: float | Tensor,
    backtrack_coeff: float = 0.8,
    max_backtracks: int = 10,
    accept_ratio: float = 0.5,
) -> LineSearchResult:
    """Finds the largest of the steps ``α^j`` that improves enough within the trust region.

    ``j`` is the smallest in ``0..max_backtracks`` with ``improvement ≥ κ α^j expected`` and ``kl ≤ max_kl``. Regions
    decide independently; one that has accepted keeps its step while others go on. A step with a non-finite improvement
    or KL is never accepted. Each try waits for the device once, to ask whether all regions have decided.

    Args:
        evaluate: maps fractions ``[n]`` of the full step to the improvement ``[n]`` over the current parameters, and
            the KL divergence ``[n]`` from them.
        expected_improvement: the improvement that the linear model predicts for the full step, ``[n]``; regions
            where it is not positive and finite are not tried.
        max_kl: the radius ``δ`` in nats, a number or ``[n]``.
        backtrack_coeff: the factor ``α`` between tries.
        max_backtracks: the number of tries after the first, ``L``.
        accept_ratio: the share ``κ`` of the predicted improvement that must be reached.

    Returns:
        The accepted steps.
    """
    possible = expected_improvement.isfinite() & (expected_improvement > 0)
    zeros = torch.zeros_like(expected_improvement)
    accepted, fraction, improvement, kl = torch.zeros_like(possible), zeros, zeros, zeros
    for tries in range(max_backtracks + 1):
        share = backtrack_coeff**tries
        # A region that has decided is evaluated at the step that it keeps; the result is not used.
        candidate = torch.where(accepted, fraction, zeros.masked_fill(possible, share))
        new_improvement, new_kl = evaluate(candidate)
        enough = new_improvement >= accept_ratio * share * expected_improvement
        inside = new_kl <= max_kl
        finite = new_improvement.isfinite() & new_kl.isfinite()
        now = possible & ~accepted & enough & inside & finite
        fraction = torch.where(now, candidate, fraction)
        improvement = torch.where(now, new_improvement, improvement)
        kl = torch.where(now, new_kl.clamp_min(0), kl)
        accepted = accepted | now
        if tries < max_backtracks and _all_decided(accepted | ~possible):
            break
    return LineSearchResult(accepted, fraction, improvement, kl)


def _all_decided(decided: Tensor) -> bool:
    """Whether no region tries further, for which the host waits for the device."""
    return bool(decided.all())
