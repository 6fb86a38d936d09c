"""Comparing algorithms over tasks and seeds, with intervals (Agarwal et al. 2021, arXiv:2108.13264)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from torchrl_trpo.numerics.statistics import percentile_bootstrap

RESAMPLES = 5000
"""The number of resamples of the stratified bootstrap."""


def interquartile_mean(scores: Tensor) -> Tensor:
    """The mean of the middle half: a quarter of the values, rounded down, is left out at each end.

    Args:
        scores: the values, ``[*B, N]``.

    Returns:
        The means, ``[*B]``.

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
    """A statistic over all runs of all tasks, and its interval by the stratified percentile bootstrap.

    Args:
        scores: the scores of the runs of each task, ``[n_tasks, n_runs]``.
        statistic: from values ``[*B, N]`` to ``[*B]``.
        level: the share of intervals that hold the true value.

    Returns:
        The statistic and the interval's two ends.
    """
    ends = percentile_bootstrap(lambda drawn: statistic(drawn.flatten(1)), scores, resamples=RESAMPLES, level=level)
    return float(statistic(scores.flatten())), *ends


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
    ends = percentile_bootstrap(_share_above, scores, others, resamples=RESAMPLES, level=level)
    return float(_share_above(scores, others)), *ends


def _share_above(scores: Tensor, others: Tensor) -> Tensor:
    """``[*B, n_tasks, n_runs]`` against ``[*B, n_tasks, n_other_runs]``, ``[*B]``."""
    difference = scores.unsqueeze(-1) - others.unsqueeze(-2)
    return ((difference > 0).double() + (difference == 0).double() / 2).mean((-3, -2, -1))
