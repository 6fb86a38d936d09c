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
    """Joins tensors into one vector per region.

    Args:
        tensors: the tensors, each ``[n, *shape]`` or, when ``n_regions`` is 1, of any shape.
        n_regions: the number of regions, ``n``.

    Returns:
        The vectors, ``[n, P]``, in the order of ``tensors``.
    """
    return torch.cat([tensor.reshape(n_regions, -1) for tensor in tensors], dim=1)


def unflatten(vectors: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Splits vectors into tensors shaped as ``like``: the inverse of :func:`flatten`.

    Args:
        vectors: one vector per region, ``[n, P]``.
        like: tensors whose shapes and order are taken.

    Returns:
        Tensors of the same shapes as ``like``.
    """
    sizes = [tensor.numel() // vectors.shape[0] for tensor in like]
    return [part.reshape(tensor.shape) for part, tensor in zip(vectors.split(sizes, dim=1), like, strict=True)]
