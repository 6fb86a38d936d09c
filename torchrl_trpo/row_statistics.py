"""Statistics over the rows of a batch that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def standardize(values: Tensor, mask: Tensor | None, dims: Sequence[int]) -> Tensor:
    """Subtracts the mean and divides by the standard deviation; a spread of rounding errors alone is no spread.

    Args:
        values: the values.
        mask: which of them count, bool of the same shape, or None for all; the others become 0.
        dims: the dimensions that mean and standard deviation (unbiased) are taken over.

    Returns:
        The standardised values; 0 where all that count are equal up to rounding.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    dims = list(dims)
    values = torch.where(mask, values, 0.0)
    count = mask.sum(dims, keepdim=True)
    centred = torch.where(mask, values - values.sum(dims, keepdim=True) / count.clamp_min(1), 0.0)
    spread = (centred.square().sum(dims, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    rounding = 32 * torch.finfo(values.dtype).eps * values.abs().amax(dims, keepdim=True)
    return torch.where(spread <= rounding, 0.0, centred / spread)


def effective_sample_size(log_weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(Σ w)² / Σ w²`` of importance weights, as a share of the rows that count.

    Args:
        log_weight: the logarithms of the weights.
        mask: which of them count, bool of the same shape, or None for all.

    Returns:
        A scalar between 0 and 1.
    """
    count = log_weight.numel() if mask is None else mask.sum()
    rows = (log_weight if mask is None else torch.where(mask, log_weight, -torch.inf)).flatten()
    return (2 * rows.logsumexp(0) - (2 * rows).logsumexp(0)).exp() / count
