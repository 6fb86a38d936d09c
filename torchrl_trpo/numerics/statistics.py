"""Statistics over the rows of a batch that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchrl_trpo.parallel.ranks import ALONE, Ranks

_BLOCK = 2**22  # the values that a bootstrap has in memory at a time


def standardize(values: Tensor, mask: Tensor | None, dims: Sequence[int], ranks: Ranks = ALONE) -> Tensor:
    """Values with mean 0 and (unbiased) deviation 1 over ``dims`` and all ranks; 0 if equal up to rounding.

    ``mask``, bool of the same shape, says which values count; the others become 0. NaN if the deviation overflows.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    dims = list(dims)
    values = torch.where(mask, values, 0.0)
    count = ranks.sum_(mask.sum(dims, keepdim=True))
    centred = torch.where(mask, values - ranks.sum_(values.sum(dims, keepdim=True)) / count.clamp_min(1), 0.0)
    spread = (ranks.sum_(centred.square().sum(dims, keepdim=True)) / (count - 1).clamp_min(1)).sqrt()
    rounding = 32 * torch.finfo(values.dtype).eps * ranks.max_(values.abs().amax(dims, keepdim=True))
    return torch.where(spread <= rounding, 0.0, centred / spread.where(spread.isfinite(), torch.nan))


def variance(values: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """The unbiased variance of ``[N]`` values, those of all ranks; NaN of a single value."""
    if ranks.size == 1:
        return values.var()
    count, total = ranks.sum_(torch.stack([values.new_tensor(values.numel()), values.sum()]))
    return ranks.sum_((values - total / count).square().sum()) / (count - 1)


def read(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Reads scalars, floating point, from the device, all in one wait."""
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


class HostScalar:
    """The value of a scalar tensor on the host; the device is asked again only after the tensor was written to."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, float] | None = None

    def read(self, scalar: Tensor) -> float:
        """The value now of the tensor, which must always be that of one quantity."""
        if scalar.device.type == "cpu":  # ``.data`` writes without being counted
            return float(scalar)
        version = scalar._version  # private: PyTorch counts the writes to a tensor nowhere else
        if self._known is None or self._known[0] is not scalar or self._known[1] != version:
            self._known = (scalar, version, float(scalar))
        return self._known[2]


def percentile_bootstrap(
    statistic: Callable[..., Tensor], *samples: Tensor, resamples: int, level: float = 0.95
) -> tuple[float, float]:
    """The ends of a confidence interval by the percentile bootstrap (Efron 1979), the same for the same samples.

    ``samples``, each ``[*B, N]``, are independent along the last dimension; values are drawn anew within their row.
    ``statistic`` maps resamples ``[R, *B, N]`` of each to ``[R]``; ``level`` is the share of intervals that hold the
    true value.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(samples))]
    block = max(1, _BLOCK // max(sample.numel() for sample in samples))
    values = []
    for start in range(0, resamples, block):
        drawn = []
        for sample, generator in zip(samples, generators, strict=True):
            shape = (min(block, resamples - start), *sample.shape)
            index = torch.randint(sample.shape[-1], shape, generator=generator)
            drawn.append(sample.expand(shape).gather(-1, index))
        values.append(statistic(*drawn))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values[0].dtype)
    low, high = torch.cat(values).quantile(ends).tolist()
    return low, high


def effective_sample_size(log_weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(Σ w)² / Σ w²`` of importance weights, given by logarithms, as a share, 0 to 1, of the rows that count.

    ``mask`` is bool of the same shape.
    """
    count = log_weight.numel() if mask is None else mask.sum()
    rows = (log_weight if mask is None else torch.where(mask, log_weight, -torch.inf)).flatten()
    return (2 * rows.logsumexp(0) - (2 * rows).logsumexp(0)).exp() / count
