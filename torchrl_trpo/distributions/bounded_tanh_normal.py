"""A TanhNormal that checks its bounds once."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchrl.modules import TanhNormal

from torchrl_trpo.kernels.settings import fixed

_Bound: TypeAlias = Tensor | np.ndarray | float | tuple[Any, ...] | list[Any]


class BoundedTanhNormal(TanhNormal):
    """A ``TanhNormal`` that checks its bounds once for each device, not each time it is made.

    TorchRL's copies and compares the bounds each time. On a GPU that waits four times at every collected step, and no
    CUDA graph can be captured. Everything else is the same.

    Args:
        loc: the location before the tanh, ``[*B, action_dim]``.
        scale: the scale before the tanh, ``[*B, action_dim]``.

    Keyword Args:
        low: the lower bound: a number, or a tuple, an array or a tensor ``[A]`` or ``[n_agents, A]``. A tensor is
            checked again if it is another object, or was written to.
        high: the upper bound, likewise.
        event_dims: how many of the last dimensions are one action. Default: 1, or 0 for a scalar.
        **kwargs: as for ``TanhNormal``.

    Examples:
        >>> import torch
        >>> from torchrl_trpo.distributions import BoundedTanhNormal
        >>> dist = BoundedTanhNormal(torch.zeros(5, 2), torch.ones(5, 2), low=(0.0, -3.0), high=3.0)
        >>> dist.deterministic_sample[0]
        tensor([1.5000, 0.0000])
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        *,
        low: _Bound = -1.0,
        high: _Bound = 1.0,
        event_dims: int | None = None,
        **kwargs: Any,
    ) -> None:
        if torch.compiler.is_compiling():  # the bounds become part of the graph
            bounds = {name: _tensor(bound, loc.dtype, loc.device) for name, bound in {"low": low, "high": high}.items()}
            super().__init__(loc, scale, **bounds, event_dims=event_dims, **kwargs)
            return
        event_dims = min(1, loc.ndim) if event_dims is None else event_dims
        ends = _hashable(low), _hashable(high)
        versions = (_version(low), _version(high))
        self.__dict__.update(_within_bounds(*ends, versions, event_dims, loc.dtype, loc.device, **kwargs))
        self.update(loc, scale)


@functools.lru_cache(maxsize=1024)
def _within_bounds(
    low: _Bound,
    high: _Bound,
    versions: tuple[int, int],
    event_dims: int,
    dtype: torch.dtype,
    device: torch.device,
    **kwargs: Any,
) -> dict[str, Any]:
    """The attributes of a ``TanhNormal`` with these bounds; ``versions`` tells tensors apart that were written to."""
    with torch.inference_mode(False):  # tensors that are cached may be differentiated later
        bounds = {name: _tensor(bound, dtype, device) for name, bound in {"low": low, "high": high}.items()}
        point = torch.zeros([1] * event_dims, dtype=dtype, device=device)
        known = vars(TanhNormal(point, torch.ones_like(point), **bounds, event_dims=event_dims, **kwargs))
    parts = (known["_t"], *getattr(known["_t"], "parts", ()))
    for tensor in (known["low"], known["high"], *(value for part in parts for value in vars(part).values())):
        if isinstance(tensor, Tensor) and tensor is not low and tensor is not high:
            fixed(tensor)
    del known["base_dist"]  # or update() would write into the cached one
    return {name: bool(value) if name.startswith("non_trivial") else value for name, value in known.items()}


def _hashable(bound: _Bound) -> Any:
    """A bound by which the checked ones can be found again."""
    if isinstance(bound, np.ndarray):
        bound = bound.tolist()
    return tuple(_hashable(part) for part in bound) if isinstance(bound, (list, tuple)) else bound


def _version(bound: _Bound) -> int:
    # PyTorch's counter of writes to a tensor has no public name.
    return bound._version if isinstance(bound, Tensor) and not bound.is_inference() else 0


def _tensor(bound: _Bound, dtype: torch.dtype, device: torch.device) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=dtype, device=device)
