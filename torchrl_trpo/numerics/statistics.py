"""Statistics over the rows of a batch that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchrl_trpo.parallel.ranks import ALONE, Ranks


def standardize(values: Tensor, mask: Tensor | None, dims: Sequence[int], ranks: Ranks = ALONE) -> Tensor:
    """Subtracts the mean and divides by the standard deviation; a spread of only rounding errors counts as 0.

    Args:
        values: the values.
        mask: which values count, bool of the same shape, or None for all; the others become 0.
        dims: the dimensions of the mean and the (unbiased) standard deviation.
        ranks: the processes that each have a part of the values.

    Returns:
        The standardised values; 0 where all values that count are equal up to rounding.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    dims = list(dims)
    values = torch.where(mask, values, 0.0)
    count = ranks.sum_(mask.sum(dims, keepdim=True))
    centred = torch.where(mask, values - ranks.sum_(values.sum(dims, keepdim=True)) / count.clamp_min(1), 0.0)
    spread = (ranks.sum_(centred.square().sum(dims, keepdim=True)) / (count - 1).clamp_min(1)).sqrt()
    rounding = 32 * torch.finfo(values.dtype).eps * ranks.max_(values.abs().amax(dims, keepdim=True))
    return torch.where(spread <= rounding, 0.0, centred / spread)


def variance(values: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """The unbiased variance.

    Args:
        values: the values, ``[N]``.
        ranks: the processes that each have a part of the values.

    Returns:
        A scalar, NaN of a single value.
    """
    if ranks.size == 1:
        return values.var()
    count, total = ranks.sum_(torch.stack([values.new_tensor(values.numel()), values.sum()]))
    return ranks.sum_((values - total / count).square().sum()) / (count - 1)


def read(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Reads numbers from the device, all in one wait.

    Args:
        numbers: scalars by name, floating point.

    Returns:
        The numbers.
    """
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def effective_sample_size(log_weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(Σ w)² / Σ w²`` of importance weights, as a share of the rows that count.

    Args:
        log_weight: the logarithms of the weights.
        mask: which weights count, bool of the same shape, or None for all.

    Returns:
        A scalar between 0 and 1.
    """
    count = log_weight.numel() if mask is None else mask.sum()
    rows = (log_weight if mask is None else torch.where(mask, log_weight, -torch.inf)).flatten()
    return (2 * rows.logsumexp(0) - (2 * rows).logsumexp(0)).exp() / count
