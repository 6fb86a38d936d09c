"""Comparing algorithms over tasks and seeds, with intervals (Agarwal et al. 2021, arXiv:2108.13264)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from torchrl_trpo.numerics.statistics import percentile_bootstrap

RESAMPLES = 5000
"""The number of resamples of the stratified bootstrap."""


def interquartile_mean(scores: Tensor) -> Tensor:
    """The mean of the middle half, ``[*B, N]`` to ``[*B]``: a quarter, rounded down, is left out at each end.

    Examples:
        >>> import torch
        >>> interquartile_mean(torch.tensor([-100.0, 1.0, 3.0, 8.0]))
        tensor(2.)
    """
    cut = scores.shape[-1] // 4
    return scores.sort(-1).values[..., cut : scores.shape[-1] - cut].mean(-1)


def aggregate(
    scores: Tensor, statistic: Callable[[Tensor], Tensor] = interquartile_mean, level: float = 0.95
) -> tuple[float, float, float]:
    """A statistic of scores ``[n_tasks, n_runs]``, over all runs of all tasks, and the ends of its interval.

    ``statistic`` takes values ``[*B, N]`` to ``[*B]``. The interval is that of the stratified percentile bootstrap;
    ``level`` is the share of intervals that hold the true value.
    """
    ends = percentile_bootstrap(lambda drawn: statistic(drawn.flatten(1)), scores, resamples=RESAMPLES, level=level)
    return float(statistic(scores.flatten())), *ends


def probability_of_improvement(scores: Tensor, others: Tensor, level: float = 0.95) -> tuple[float, float, float]:
    """The probability that a run of one algorithm beats another's on the same task, and the ends of its interval.

    It is the mean over tasks, of scores ``[n_tasks, n_runs]``; the algorithms may differ in ``n_runs``. Equal scores
    count one half (Mann and Whitney's U statistic). The interval is as of :func:`aggregate`.
    """
    ends = percentile_bootstrap(_share_above, scores, others, resamples=RESAMPLES, level=level)
    return float(_share_above(scores, others)), *ends


def _share_above(scores: Tensor, others: Tensor) -> Tensor:
    """``[*B, n_tasks, n_runs]`` against ``[*B, n_tasks, n_other_runs]``, ``[*B]``."""
    difference = scores.unsqueeze(-1) - others.unsqueeze(-2)
    return ((difference > 0).double() + (difference == 0).double() / 2).mean((-3, -2, -1))
