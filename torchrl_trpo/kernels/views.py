"""Operations that make tensors of constants, and move lanes about."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchrl_trpo.kernels.lanes import Lanes, Statements, Unsupported, aligned, constant, constant_tensor


class Views:
    """The operations of ``torch.ops.aten`` that make, copy, view and join tensors, as methods with their names.

    Args:
        n_rows: the size of the batch.

    Attributes:
        statements: the statements so far.
    """

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self._kind = ""  # of the result of the operation at work
        self.statements = Statements()

    def _full(self, size: Sequence[int], value: Any, kind: str) -> Lanes:
        number = constant(self.statements.convert(value, kind), kind, self._n_rows)
        return Lanes(np.broadcast_to(number.values, tuple(size)), None, self._n_rows, kind)

    def _to_copy(self, tensor: Lanes, **_: Any) -> Lanes:
        kind = self._kind or tensor.kind
        if tensor.kind == kind:
            return tensor
        return self.statements.elementwise(functools.partial(self.statements.convert, kind=kind), kind, tensor)

    def copy(self, tensor: Lanes, source: Lanes, non_blocking: bool = False) -> Lanes:
        return self.expand(self._to_copy(source), tensor.shape)

    def fill(self, tensor: Lanes, value: Any) -> Lanes:
        source = value if isinstance(value, Lanes) else self._full((), value, self._kind)
        return self.expand(self._to_copy(source), tensor.shape)

    def _view(self, tensor: Lanes, values: np.ndarray, axis: int | None) -> Lanes:
        return Lanes(values, axis, self._n_rows, tensor.kind)

    def unsqueeze(self, tensor: Lanes, dim: int) -> Lanes:
        dim %= tensor.ndim + 1
        axis = tensor.axis if tensor.axis is None or tensor.axis < dim else tensor.axis + 1
        return self._view(tensor, np.expand_dims(tensor.values, dim), axis)

    def squeeze(self, tensor: Lanes, dim: Any = None) -> Lanes:
        dims = [d for d in dims_of(dim, tensor.ndim) if tensor.shape[d] == 1]
        return self._view(tensor, np.squeeze(tensor.values, tuple(dims)), without(tensor.axis, dims))

    def expand(self, tensor: Lanes, size: Sequence[int], implicit: bool = False) -> Lanes:
        added = len(size) - tensor.ndim
        shape = [
            *size[:added],
            *(old if new == -1 else new for old, new in zip(tensor.shape, size[added:], strict=True)),
        ]
        axis = None if tensor.axis is None else tensor.axis + added
        if axis is not None:
            shape[axis] = tensor.values.shape[axis - added]
        return self._view(tensor, np.broadcast_to(tensor.values, shape), axis)

    def view(self, tensor: Lanes, size: Sequence[int]) -> Lanes:
        shape = list(size)
        if -1 in shape:
            shape[shape.index(-1)] = math.prod(tensor.shape) // max(1, -math.prod(shape))
        if tensor.axis is None:
            return self._view(tensor, tensor.values.reshape(shape), None)
        before = math.prod(tensor.shape[: tensor.axis])
        for axis, length in enumerate(shape):
            if length % self._n_rows == 0 and math.prod(shape[:axis]) == before:
                shape[axis] = length // self._n_rows
                return self._view(tensor, tensor.values.reshape(shape), axis)
        raise Unsupported(f"a view of {tensor.shape} as {tuple(shape)}")

    reshape = _unsafe_view = view

    def permute(self, tensor: Lanes, dims: Sequence[int]) -> Lanes:
        order = [dim % tensor.ndim for dim in dims]
        return self._view(
            tensor, tensor.values.transpose(order), None if tensor.axis is None else order.index(tensor.axis)
        )

    def transpose(self, tensor: Lanes, first: int, second: int) -> Lanes:
        order = list(range(tensor.ndim))
        order[first], order[second] = order[second], order[first]
        return self.permute(tensor, order)

    def t(self, tensor: Lanes) -> Lanes:
        return self.transpose(tensor, 0, 1) if tensor.ndim == 2 else tensor

    def select(self, tensor: Lanes, dim: int, index: int) -> Lanes:
        return self._drop(self._take(tensor, dim, [index % tensor.shape[dim]]), dim)

    def _drop(self, tensor: Lanes, dim: int) -> Lanes:
        dim %= tensor.ndim
        return self._view(tensor, np.squeeze(tensor.values, dim), without(tensor.axis, [dim]))

    def slice(self, tensor: Lanes, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Lanes:
        return self._take(tensor, dim, _indices(tensor.shape[dim], start, end, step))

    def _take(self, tensor: Lanes, dim: int, indices: Sequence[int]) -> Lanes:
        dim %= tensor.ndim
        if dim != tensor.axis:
            return self._view(tensor, np.take(tensor.values, indices, dim), tensor.axis)
        if list(indices) == list(range(tensor.shape[dim])):
            return tensor
        raise Unsupported("some rows are read")

    def unbind(self, tensor: Lanes, dim: int = 0) -> list[Lanes]:
        return [self.select(tensor, dim, index) for index in range(tensor.shape[dim])]

    def split(self, tensor: Lanes, size: int, dim: int = 0) -> list[Lanes]:
        return [self.slice(tensor, dim, start, start + size) for start in range(0, tensor.shape[dim], size)]

    def split_with_sizes(self, tensor: Lanes, sizes: Sequence[int], dim: int = 0) -> list[Lanes]:
        ends = itertools.accumulate(sizes)
        return [self.slice(tensor, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def repeat(self, tensor: Lanes, repeats: Sequence[int]) -> Lanes:
        for _ in range(len(repeats) - tensor.ndim):
            tensor = self.unsqueeze(tensor, 0)
        if tensor.axis is not None and repeats[tensor.axis] != 1:
            raise Unsupported("rows are repeated")
        return self._view(tensor, np.tile(tensor.values, repeats), tensor.axis)

    def diagonal(self, tensor: Lanes, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Lanes:
        dims = dims_of([dim1, dim2], tensor.ndim)
        if tensor.axis in dims:
            raise Unsupported("a diagonal over rows")
        return self._view(tensor, np.diagonal(tensor.values, offset, *dims), without(tensor.axis, dims))

    def cat(self, tensors: Sequence[Lanes], dim: int = 0) -> Lanes:
        tensors = [self._to_copy(tensor) for tensor in tensors if tensor.shape != (0,)]
        dim %= tensors[0].ndim
        arrays, axis, _ = aligned(*tensors)
        axis = None if axis is None else tensors[0].ndim + axis
        if axis == dim:
            raise Unsupported("rows are joined with other rows")
        return Lanes(np.concatenate(arrays, dim), axis, self._n_rows, self._kind)

    def stack(self, tensors: Sequence[Lanes], dim: int = 0) -> Lanes:
        return self.cat([self.unsqueeze(tensor, dim) for tensor in tensors], dim)

    # Writes to a part of a tensor

    def select_scatter(self, tensor: Lanes, source: Lanes, dim: int, index: int) -> Lanes:
        dim %= tensor.ndim
        return self._put(tensor, self.unsqueeze(source, dim), dim, [index % tensor.shape[dim]])

    def slice_scatter(
        self, tensor: Lanes, source: Lanes, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
    ) -> Lanes:
        dim %= tensor.ndim
        indices = _indices(tensor.shape[dim], start, end, step)
        return source if len(indices) == tensor.shape[dim] else self._put(tensor, source, dim, indices)

    def _put(self, tensor: Lanes, source: Lanes, dim: int, indices: Sequence[int]) -> Lanes:
        (values, written), axis, _ = aligned(tensor, source)
        axis = None if axis is None else tensor.ndim + axis
        if axis == dim:
            raise Unsupported("some rows are written")
        values = values.copy()
        values[(slice(None),) * dim + (list(indices),)] = written
        return Lanes(values, axis, self._n_rows, tensor.kind)

    # New tensors

    def full(self, size: Sequence[int], value: Any, **_: Any) -> Lanes:
        return self._full(size, value, self._kind)

    def full_like(self, tensor: Lanes, value: Any, **_: Any) -> Lanes:
        return self._full(tensor.shape, value, self._kind)

    def zeros(self, size: Sequence[int], **_: Any) -> Lanes:
        return self._full(size, 0, self._kind)

    empty = zeros

    def new_zeros(self, tensor: Lanes, size: Sequence[int], **_: Any) -> Lanes:
        return self._full(size, 0, self._kind)

    new_empty = new_zeros

    def new_ones(self, tensor: Lanes, size: Sequence[int], **_: Any) -> Lanes:
        return self._full(size, 1, self._kind)

    def ones(self, size: Sequence[int], **_: Any) -> Lanes:
        return self._full(size, 1, self._kind)

    def zeros_like(self, tensor: Lanes, **_: Any) -> Lanes:
        return self._full(tensor.shape, 0, self._kind)

    empty_like = zeros_like

    def ones_like(self, tensor: Lanes, **_: Any) -> Lanes:
        return self._full(tensor.shape, 1, self._kind)

    def scalar_tensor(self, value: Any, **_: Any) -> Lanes:
        return self._full((), value, self._kind)

    def arange(self, *arguments: Any, **_: Any) -> Lanes:
        return constant_tensor(torch.arange(*arguments), self._n_rows)

    def eye(self, *sizes: int, **_: Any) -> Lanes:
        return constant_tensor(torch.eye(*sizes), self._n_rows)

    # Entries at places that are computed

    def index(self, tensor: Lanes, indices: Sequence[Any]) -> Lanes:
        table, place = self._table(tensor, indices)
        values = np.empty((1,), object)
        values[0] = self.statements.take(table, place, tensor.kind)
        return Lanes(values, 0, self._n_rows, tensor.kind)

    def index_put(self, tensor: Lanes, indices: Sequence[Any], value: Any, accumulate: bool = False) -> Lanes:
        table, place = self._table(tensor, indices)
        if accumulate or value.ndim or value.axis is not None:
            raise Unsupported("several values are put at computed places")
        written = self.statements.put(table, place, value.values[()], tensor.kind)
        return Lanes(written.reshape(tensor.values.shape), tensor.axis, self._n_rows, tensor.kind)

    def _table(self, tensor: Lanes, indices: Sequence[Any]) -> tuple[np.ndarray, Any]:
        """The lanes of a row of ``tensor[arange(n), i, j, ...]``, and the place in it for ``i, j, ...`` ``[n]``."""
        rows, *others = indices
        is_row = rows is not None and rows.axis is None and list(rows.values.flat) == list(range(self._n_rows))
        if not is_row or tensor.axis != 0 or [each.axis for each in others] != [0] * (tensor.ndim - 1):
            raise Unsupported("it reads or writes at computed places of another kind than x[arange(n), i, j]")
        if any(each.ndim != 1 or each.kind == "b" for each in others):
            raise Unsupported("places are computed for several entries of a row")
        place: Any = 0
        for index, size in zip(others, tensor.shape[1:], strict=True):
            place = self.statements.place(place, index.values[0], size)
        return tensor.values.reshape(-1), place


def dims_of(dim: Any, ndim: int) -> list[int]:
    """The dimensions that an argument names; None and ``[]`` name all."""
    if dim is None or dim == []:
        return list(range(ndim))
    return sorted(d % ndim for d in ([dim] if isinstance(dim, int) else dim))


def without(axis: int | None, dims: Sequence[int]) -> int | None:
    """Where the batch dimension is when some dimensions are gone."""
    return None if axis is None or axis in dims else axis - sum(dim < axis for dim in dims)


def _indices(size: int, start: Any, end: Any, step: int) -> list[int]:
    return list(range(*slice(start, end, step).indices(size)))
