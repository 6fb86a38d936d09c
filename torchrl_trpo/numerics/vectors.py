"""Flat parameter vectors: one row per trust region.

``P`` is the number of parameters of one region, ``n`` the number of regions solved together.
A tensor of a batched region carries the regions on its leading dimension; a tensor of a single region
has any shape.  Both are one reshape away from ``[n, P]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor], n_regions: int) -> Tensor:
    """Joins tensors ``[n, *shape]``, of any shape when ``n`` is 1, into one vector per region, ``[n, P]``."""
    return torch.cat([tensor.reshape(n_regions, -1) for tensor in tensors], dim=1)


def unflatten(vectors: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Splits vectors ``[n, P]`` into tensors with the shapes and types of ``like``: the inverse of :func:`flatten`.

    Where the types of ``like`` differ, the vectors have the widest, and parts are rounded.
    """
    sizes = [tensor.numel() // vectors.shape[0] for tensor in like]
    parts = vectors.split(sizes, dim=1)
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]
