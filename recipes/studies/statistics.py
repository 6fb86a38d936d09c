"""Comparing algorithms over tasks and seeds, with intervals (Agarwal et al. 2021, arXiv:2108.13264)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RESAMPLES = 5000
"""The number of resamples of the stratified bootstrap."""


def interquartile_mean(scores: Tensor) -> Tensor:
    """The mean of the middle half: a quarter of the values, rounded down, is left out at each end.

    Args:
        scores: the values, ``[*B, N]``.

    Returns:
        The means, ``[*B]``.

    Examples:
        >>> interquartile_mean(torch.tensor([-100.0, 1.0, 3.0, 8.0]))
        tensor(2.)
    """
    cut = scores.shape[-1] // 4
    return scores.sort(-1).values[..., cut : scores.shape[-1] - cut].mean(-1)


def stratified_resamples(scores: Tensor, seed: int = 0) -> Tensor:
    """Resamples the runs of each task, with replacement.

    Args:
        scores: the scores of the runs of each task, ``[n_tasks, n_runs]``.
        seed: the seed of the random numbers.

    Returns:
        The resamples, ``[RESAMPLES, n_tasks, n_runs]``.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(scores.shape[1], (RESAMPLES, *scores.shape), generator=generator)
    return scores.expand(RESAMPLES, -1, -1).gather(-1, drawn)


def aggregate(
    scores: Tensor, statistic: Callable[[Tensor], Tensor] = interquartile_mean, level: float = 0.95
) -> tuple[float, float, float]:
    """A statistic over all runs of all tasks, and its interval by the stratified percentile bootstrap.

    Args:
        scores: the scores of the runs of each task, ``[n_tasks, n_runs]``.
        statistic: from values ``[*B, N]`` to ``[*B]``.
        level: the share of intervals that hold the true value.

    Returns:
        The statistic and the interval's two ends.
    """
    return _with_interval(statistic(scores.flatten()), statistic(stratified_resamples(scores).flatten(1)), level)


def probability_of_improvement(scores: Tensor, others: Tensor, level: float = 0.95) -> tuple[float, float, float]:
    """Estimates the probability that a run of one algorithm beats a run of another on the same task, mean over tasks.

    Equal scores count one half (Mann and Whitney's U statistic).

    Args:
        scores: the scores of the runs of each task, ``[n_tasks, n_runs]``.
        others: the other algorithm's, ``[n_tasks, n_other_runs]``.
        level: the share of intervals that hold the true value.

    Returns:
        The probability, and the ends of its interval by the stratified percentile bootstrap.
    """
    resamples = _share_above(stratified_resamples(scores, 0), stratified_resamples(others, 1))
    return _with_interval(_share_above(scores, others), resamples, level)


def _share_above(scores: Tensor, others: Tensor) -> Tensor:
    """``[*B, n_tasks, n_runs]`` against ``[*B, n_tasks, n_other_runs]``, ``[*B]``."""
    difference = scores.unsqueeze(-1) - others.unsqueeze(-2)
    return ((difference > 0).double() + (difference == 0).double() / 2).mean((-3, -2, -1))


def _with_interval(value: Tensor, resamples: Tensor, level: float) -> tuple[float, float, float]:
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=resamples.dtype)
    low, high = resamples.quantile(ends).tolist()
    return float(value), low, high
