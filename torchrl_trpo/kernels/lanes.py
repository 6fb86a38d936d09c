"""Tensors with a batch dimension as arrays of lanes, and the statements that compute them for one row of the batch.

A lane is one number of each row. A tensor ``[n, 3, 2]`` of a batch of ``n`` rows has six lanes. Reshaping, stacking and
indexing tensors moves lanes about and costs nothing at run time; arithmetic becomes statements on lanes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {"f": torch.float32, "b": torch.bool, "i": torch.int64, "j": torch.int32}
"""The dtypes of tensors by the kind of their lanes; ``i`` and ``j`` are whole numbers, computed in float32."""
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
"""The kinds by dtype."""
OTHER_KIND = "?"
"""The kind of the lanes of other dtypes, with which nothing can be computed."""
BLOCKS = {"linear", "map", "table", "put"}
"""The operations of statements that have several results."""


class Unsupported(Exception):
    """A function that cannot be computed row by row, with the reason."""


class Lane(NamedTuple):
    """A number of each row that is known at run time; others are Python numbers."""

    number: int
    kind: str


class Statement(NamedTuple):
    """An operation, the kind of its result, and its arguments: lanes and constants."""

    operation: str
    kind: str
    arguments: tuple[Any, ...]


class Items(NamedTuple):
    """Some of the results of a statement that has several, which are next to each other."""

    block: int
    first: int
    length: int = 1


class InMemory(NamedTuple):
    """Numbers of an input that all rows share, at equal distances."""

    name: str
    first: int
    step: int


class Lanes:
    """A tensor as an object array of lanes and constants.

    Args:
        values: the lanes, in the tensor's shape, with size 1 along the batch dimension. It has size k if a dimension
            of size k has been joined to it.
        axis: the batch dimension; None if all rows have the same values.
        n_rows: the size of the batch.
        kind: the kind of the lanes.
    """

    def __init__(self, values: np.ndarray, axis: int | None, n_rows: int, kind: str) -> None:
        self.values = values
        self.axis = axis
        self.n_rows = n_rows
        self.kind = kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape, with the batch dimension."""
        return tuple(self.n_rows * size if d == self.axis else size for d, size in enumerate(self.values.shape))

    def of_rows(self) -> np.ndarray | None:
        """The lanes of a tensor with the batch as its first dimension; None if it has no such dimension."""
        if self.axis == 0 and len(self.values) == 1:
            return self.values
        if self.axis is not None or self.values.shape[:1] != (self.n_rows,):
            return None
        return _of_one_row(self, -self.ndim)

    def is_same(self, other: Lanes) -> bool:
        """Whether two tensors are equal because they are the same lanes."""
        ours, theirs = self.values, other.values
        if (self.axis, ours.shape) != (other.axis, theirs.shape):
            return False
        return all(a == b and type(a) is type(b) for a, b in zip(ours.flat, theirs.flat, strict=True))

    @property
    def ndim(self) -> int:
        """The number of the tensor's dimensions."""
        return self.values.ndim


class Statements:
    """The statements of a function of one row. Equal ones are there once, and those of constants are computed here."""

    def __init__(self) -> None:
        self.all: list[Statement] = []
        self._lanes: dict[Any, Lane] = {}

    def add(self, operation: str, kind: str, *arguments: Any) -> Lane:
        """The lane of a statement, which is added unless it is there."""
        key = (operation, kind, *((type(argument), repr(argument)) for argument in arguments))
        if key not in self._lanes:
            self._lanes[key] = Lane(len(self.all), kind)
            self.all.append(Statement(operation, kind, arguments))
        return self._lanes[key]

    def convert(self, value: Any, kind: str) -> Any:
        """A lane or constant as another kind."""
        if not isinstance(value, Lane):
            if kind in {"i", "j"} and int(np.float32(value)) != int(value):
                raise Unsupported(f"the whole number {value}, which float32 does not hold")
            return float(np.float32(value)) if kind == "f" else bool(value) if kind == "b" else int(value)
        if value.kind == kind:
            return value
        if value.kind == OTHER_KIND:
            raise Unsupported("a number that is neither float32 nor bool nor a whole number of 32 or 64 bits")
        if kind == "b":
            return self.add("nonzero", "b", value)
        if value.kind == "b":
            return self.add("one", kind, value)
        return self.add("trunc" if value.kind == "f" else "same", kind, value)

    def apply(self, operation: str, kind: str, of: str, *arguments: Any) -> Any:
        """The result of an operation on arguments that are first converted to the kind ``of``."""
        converted = [self.convert(argument, of) for argument in arguments]
        if any(isinstance(argument, Lane) for argument in converted):
            return self.add(operation, kind, *converted)
        plain = [np.float32(argument) if of == "f" else argument for argument in converted]
        with np.errstate(all="ignore"):
            return self.convert(_CONSTANT[operation](*plain), kind)

    def where(self, condition: Any, value: Any, other: Any, kind: str) -> Any:
        """``value`` where the condition holds, else ``other``."""
        condition = self.convert(condition, "b")
        value, other = self.convert(value, kind), self.convert(other, kind)
        if not isinstance(condition, Lane):
            return value if condition else other
        if value == other and type(value) is type(other):
            return value
        return self.add("where", kind, condition, value, other)

    def any_row(self, value: Any, matters: Any = True) -> Any:
        """Whether any row of the batch has it: a lane that is the same for all rows. It is right if any row matters."""
        return self.add("any", "b", value, matters) if isinstance(value, Lane) else value

    def block(self, operation: str, length: int, kind: str, *arguments: Any) -> np.ndarray:
        """The results of a statement that has several."""
        number = self.add(operation, kind, *arguments).number
        items = np.empty(length, object)
        for item in range(length):
            items[item] = self.add("item", kind, Items(number, item))
        return items

    def place(self, row: Any, index: Any, size: int) -> Any:
        """The place of an entry in a table of ``size`` columns; negative if the index is none of 0, ..., size - 1."""
        is_column = self.apply("and", "b", "b", *(self.apply(*each) for each in _bounds(index, size)))
        place = self.apply("add", "i", "i", self.apply("mul", "i", "i", row, size), index)
        return self.where(self.apply("and", "b", "b", is_column, self.apply("ge", "b", "i", row, 0)), place, -1, "i")

    def take(self, table: np.ndarray, place: Any, kind: str) -> Lane:
        """The entry at a computed place of a table. The function fails if there is none."""
        return self.add("take", kind, self._items(table, kind), self.convert(place, "i"))

    def put(self, table: np.ndarray, place: Any, value: Any, kind: str) -> np.ndarray:
        """A table with another entry at a computed place. The function fails if there is none."""
        arguments = self._items(table, kind), self.convert(place, "i"), self.convert(value, kind)
        return self.block("put", len(table), kind, *arguments)

    def _items(self, values: np.ndarray, kind: str) -> Items:
        """Lanes as results of one statement, which are next to each other."""
        found = [self.all[value.number] if isinstance(value, Lane) else None for value in values]
        first = found[0]
        if first is not None and first.operation == "item":
            items = first.arguments[0]
            if [each and each.arguments[0] for each in found] == [items._replace(first=n) for n in range(len(found))]:
                return items._replace(length=len(found))
        if first is not None and first.operation == "load":
            name, lane = first.arguments
            if found == [first._replace(arguments=(name, lane + n)) for n in range(len(found))]:
                return Items(self.add("table", kind, name, lane, len(found)).number, 0, len(found))
        raise Unsupported("a table of entries that are computed one by one")

    def inputs(self, name: str, shape: Sequence[int], axis: int | None, n_rows: int, kind: str) -> Lanes:
        """An input of the function: with a batch dimension, or the same for all rows. ``shape`` has 1 for the batch."""
        operation = "shared" if axis is None else "load"
        first, size = len(self.all), math.prod(shape)
        self.all += [Statement(operation, kind, (name, lane)) for lane in range(size)]
        values = np.fromiter((Lane(first + lane, kind) for lane in range(size)), object, size)
        return Lanes(values.reshape(tuple(shape)), axis, n_rows, kind)

    def elementwise(self, function: Callable[..., Any], kind: str, *tensors: Any) -> Lanes:
        """A function of the lanes of tensors and numbers, broadcast against each other."""
        arrays, axis, n_rows = aligned(*tensors)
        broadcast = np.broadcast_arrays(*arrays)
        values = np.empty(broadcast[0].shape, object)
        for place in np.ndindex(*values.shape):
            values[place] = function(*(array[place] for array in broadcast))
        return Lanes(values, None if axis is None else values.ndim + axis, n_rows, kind)


class Lowered(NamedTuple):
    """A graph as statements for one row.

    Attributes:
        inputs: the inputs of the graph.
        outputs: the outputs of the graph.
        statements: the statements that compute them.
        draws: the random tensors: for each its shape, with the batch first, and the method of ``Tensor`` that fills
            one, with its arguments, as :class:`~torchrl_trpo.kernels.buffers.Draws` takes them. They are the inputs
            ``draw0``, ``draw1``, ... of the statements.
        used: how many of the numbers that are drawn under conditions a row has used, a lane or constant; None if
            there are none.
        masks: by the numbers of random tensors the rows that are drawn, bool ``[n]``; all of those that are not here.
        firsts: for each of the inputs ``first0``, ``first1``, ... that all rows share a tensor, and a mask bool
            ``[n]``: the input is the tensor's first row in the mask.
    """

    inputs: list[Lanes]
    outputs: list[Any]
    statements: Statements
    draws: list[tuple[tuple[int, ...], str, tuple[float, ...]]]
    used: Any
    masks: dict[int, Lanes]
    firsts: list[tuple[Lanes, Lanes]]


def constant(value: Any, kind: str, n_rows: int) -> Lanes:
    """A number as a tensor without dimensions."""
    values = np.empty((), object)
    values[()] = value
    return Lanes(values, None, n_rows, kind)


def constant_tensor(tensor: Tensor, n_rows: int) -> Lanes:
    """A tensor whose numbers are known, and the same for all rows."""
    if tensor.dtype not in KINDS:
        raise Unsupported(f"a tensor of {tensor.dtype}")
    values = np.empty(tuple(tensor.shape), object)
    numbers = tensor.detach().cpu().numpy()
    for place in np.ndindex(*values.shape):
        values[place] = numbers[place].item()
    return Lanes(values, None, n_rows, KINDS[tensor.dtype])


def aligned(*tensors: Any) -> tuple[list[np.ndarray], int | None, int]:
    """The lanes of tensors and numbers, for broadcasting: all have size 1 along the batch dimension.

    Returns the arrays, the batch dimension counted from the last one, and the size of the batch.
    """
    n_rows = next(tensor.n_rows for tensor in tensors if isinstance(tensor, Lanes))
    found = [tensor if isinstance(tensor, Lanes) else constant(tensor, "", n_rows) for tensor in tensors]
    axes = {tensor.axis - tensor.ndim for tensor in found if tensor.axis is not None}
    if len(axes) > 1:
        raise Unsupported("rows are combined with other rows")
    axis = next(iter(axes), None)
    arrays = [_of_one_row(tensor, axis) for tensor in found]
    if axis is not None:
        size = max(array.shape[axis] for array in arrays if array.ndim >= -axis)
        shapes = [(*a.shape[:axis], size, *a.shape[axis:][1:]) if a.ndim >= -axis else a.shape for a in arrays]
        arrays = [np.broadcast_to(array, shape) for array, shape in zip(arrays, shapes, strict=True)]
    return arrays, axis, n_rows


def _of_one_row(tensor: Lanes, axis: int | None) -> np.ndarray:
    """The lanes, with size 1 along a batch dimension counted from the last one, also of a constant tensor."""
    values = tensor.values
    if axis is None or tensor.axis is not None or values.ndim < -axis or values.shape[axis] == 1:
        return values
    first = np.take(values, [0], axis)
    if values.strides[axis] != 0:  # otherwise it was expanded from one row
        for value, of_first in zip(values.flat, np.broadcast_to(first, values.shape).flat, strict=True):
            if value != of_first or type(value) is not type(of_first):
                raise Unsupported("a constant differs from row to row")
    return first


def _bounds(index: Any, size: int) -> list[tuple[Any, ...]]:
    return [("ge", "b", "i", index, 0), ("lt", "b", "i", index, size)]


def _by_torch(function: Callable[..., Tensor]) -> Callable[..., float]:
    return lambda *numbers: function(*(torch.tensor(float(number)) for number in numbers)).item()


_CONSTANT: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.not_,
    "neg": operator.neg,
    "abs": abs,
    "sign": np.sign,
    "isnan": math.isnan,
    "floordiv": _by_torch(torch.floor_divide),
    "mod": _by_torch(torch.remainder),
    "pow": _by_torch(torch.pow),
    **{
        name: _by_torch(getattr(torch, name))
        for name in (
            "sqrt",
            "sin",
            "cos",
            "tan",
            "tanh",
            "atanh",
            "exp",
            "expm1",
            "log",
            "log1p",
            "reciprocal",
            "atan2",
            "logaddexp",
        )
    },
}
"""The operations on constants."""
