"""PyTorch's operations on tensors of lanes: a traced graph becomes statements for one row of the batch."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from torchrl_trpo.kernels.buffers import DRAWN_IF
from torchrl_trpo.kernels.lanes import KINDS, OTHER_KIND, Lanes, Lowered, Unsupported, constant_tensor
from torchrl_trpo.kernels.views import Views, dims_of, without

_SAME_NAME = (
    *("neg", "abs", "sqrt", "sin", "cos", "tan", "exp", "log", "log1p", "expm1", "tanh", "atanh"),
    *("reciprocal", "sign", "atan2", "logaddexp"),
)
_ELEMENTWISE = {  # operation of aten: the statement's operation; the result has the kind of the arguments
    **{name: name for name in _SAME_NAME},
    "minimum": "min",
    "maximum": "max",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_not": "not",
    "sgn": "sign",
}
_LOGICAL = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_SAME = ("detach", "alias", "lift_fresh_copy", "clone", "contiguous", "conj_physical")


class _Pairs(NamedTuple):
    """``row & column``, a bool for each pair of rows: ``[n, 1]`` and ``[n]``. Only ``any`` and ``all`` can follow."""

    row: Lanes
    column: Lanes


class Operations(Views):
    """The operations of ``torch.ops.aten``, as methods with their names and arguments.

    Args:
        graph: a graph of :func:`~torchrl_trpo.kernels.record.record` for a batch, without mutations.
        n_rows: the size of the batch.
    """

    def __init__(self, graph: fx.GraphModule, n_rows: int) -> None:
        super().__init__(n_rows)
        self._graph = graph
        self.draws: list[tuple[tuple[int, ...], str, tuple[float, ...]]] = []
        self.masks: dict[int, Lanes] = {}
        self.firsts: list[tuple[Lanes, Lanes]] = []
        self._n_drawn_if, self._used = 0, 0

    def lower(self, inputs: Sequence[tuple[str, Tensor, int | None]]) -> Lowered:
        """Lowers the graph to statements for one row.

        Args:
            inputs: for each placeholder a name, a tensor like it, and its batch dimension; None if all rows share it.

        Returns:
            The statements, and what they compute. :class:`~torchrl_trpo.kernels.lanes.Unsupported` is raised if the
            graph combines rows, or has an operation or a dtype that is not known here.
        """
        lanes = []
        for name, tensor, axis in inputs:
            shape = [1 if dim == axis else size for dim, size in enumerate(tensor.shape)]
            kind = KINDS.get(tensor.dtype, OTHER_KIND)
            lanes.append(self.statements.inputs(name, shape, axis, self._n_rows, kind))
        outputs = self._run(lanes)
        drawn_if = [((self._n_rows, self._n_drawn_if), DRAWN_IF, ())] if self._n_drawn_if else []
        used = self._used if drawn_if else None
        return Lowered(lanes, outputs, self.statements, [*self.draws, *drawn_if], used, self.masks, self.firsts)

    def _run(self, inputs: Sequence[Lanes]) -> list[Any]:
        values: dict[fx.Node, Any] = {}
        remaining = iter(inputs)
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "get_attr":
                values[node] = self.attribute(node)
            elif node.op == "output":
                return list(fx.node.map_arg(node.args[0], values.__getitem__))
            else:
                arguments, keywords = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = self._call(node, arguments, keywords)
                except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
                    raise Unsupported(f"{node.target} with arguments that are not known here") from error
        raise AssertionError("a graph has an output")

    def attribute(self, node: fx.Node) -> Lanes:
        """A tensor that the graph holds."""
        return constant_tensor(getattr(self._graph, node.target), self._n_rows)  # type: ignore[arg-type]

    def _call(self, node: fx.Node, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        if node.target is operator.getitem:
            return arguments[0][arguments[1]]
        name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
        dtype = getattr(node.meta.get("val"), "dtype", None)  # several tensors have none
        if dtype is not None and dtype not in KINDS:
            raise Unsupported(f"{name} of {dtype}")
        self._kind = "" if dtype is None else KINDS[dtype]
        if name in _ELEMENTWISE:
            return self._elementwise(_ELEMENTWISE[name], *arguments)
        if name in _LOGICAL:
            return self._elementwise(_LOGICAL[name], *arguments, of="b")
        if name in _COMPARISONS:
            return self._compare(name, *arguments)
        if name in _SAME:
            return arguments[0]
        method = getattr(self, name, None)
        if method is None:
            raise Unsupported(f"it calls torch.ops.aten.{name}, which is not known here")
        result = method(*arguments, **keywords)
        users = {getattr(user.target, "overloadpacket", None) for user in node.users}
        if isinstance(result, _Pairs) and not users <= {torch.ops.aten.any, torch.ops.aten.all}:
            raise Unsupported("rows are combined with other rows")
        return result

    # Arithmetic

    def _elementwise(self, operation: str, *tensors: Any, kind: str = "", of: str = "") -> Lanes:
        kind = kind or self._kind
        apply = functools.partial(self.statements.apply, operation, kind, of or kind)
        return self.statements.elementwise(apply, kind, *tensors)

    def _compare(self, operation: str, tensor: Any, other: Any) -> Lanes:
        kinds = {
            each.kind if isinstance(each, Lanes) else "f" if isinstance(each, float) else "i"
            for each in (tensor, other)
        }
        return self._elementwise(operation, tensor, other, kind="b", of="f" if "f" in kinds else "i")

    def add(self, tensor: Any, other: Any, alpha: Any = 1) -> Lanes:
        if self._kind == "b":
            return self._elementwise("or", tensor, other)
        return self._elementwise("add", tensor, other if alpha == 1 else self._elementwise("mul", other, alpha))

    def sub(self, tensor: Any, other: Any, alpha: Any = 1) -> Lanes:
        return self._elementwise("sub", tensor, other if alpha == 1 else self._elementwise("mul", other, alpha))

    def rsub(self, tensor: Any, other: Any, alpha: Any = 1) -> Lanes:
        return self.sub(other, tensor, alpha)

    def mul(self, tensor: Any, other: Any) -> Any:
        both = [each for each in (tensor, other) if isinstance(each, Lanes) and each.axis is not None]
        if self._kind == "b" and {each.axis - each.ndim for each in both} == {-1, -2}:  # type: ignore[operator]
            return _Pairs(*sorted(both, key=lambda each: each.axis - each.ndim))  # type: ignore[operator]
        if isinstance(other, (int, float)) and other == 1 and tensor.kind == self._kind:
            return tensor
        return self._elementwise("and" if self._kind == "b" else "mul", tensor, other)

    def div(self, tensor: Any, other: Any, rounding_mode: str | None = None) -> Lanes:
        if rounding_mode not in (None, "floor"):
            raise Unsupported(f"div with rounding_mode={rounding_mode!r}")
        return self._elementwise("div" if rounding_mode is None else "floordiv", tensor, other)

    def pow(self, tensor: Lanes, exponent: Any) -> Lanes:
        if exponent in (2, 3):
            square = self._elementwise("mul", tensor, tensor)
            return square if exponent == 2 else self._elementwise("mul", square, tensor)
        return self._elementwise("sqrt", tensor) if exponent == 0.5 else self._elementwise("pow", tensor, exponent)

    def clamp(self, tensor: Lanes, low: Any = None, high: Any = None) -> Lanes:
        tensor = tensor if low is None else self._elementwise("max", tensor, low)
        return tensor if high is None else self._elementwise("min", tensor, high)

    def clamp_min(self, tensor: Lanes, low: Any) -> Lanes:
        return self.clamp(tensor, low)

    def clamp_max(self, tensor: Lanes, high: Any) -> Lanes:
        return self.clamp(tensor, None, high)

    def logical_not(self, tensor: Lanes) -> Lanes:
        return self._elementwise("not", tensor, kind="b")

    def isnan(self, tensor: Lanes) -> Lanes:
        return self._elementwise("isnan", tensor, kind="b", of="f")

    def nan_to_num(self, tensor: Lanes, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Lanes:
        largest = torch.finfo(torch.float32).max
        for special, value, default in ((math.inf, posinf, largest), (-math.inf, neginf, -largest)):
            is_special = self._compare("eq", tensor, special)
            tensor = self._where(is_special, default if value is None else value, tensor, tensor.kind)
        return self._where(self.isnan(tensor), 0.0 if nan is None else nan, tensor, tensor.kind)

    def where(self, condition: Any, tensor: Any, other: Any) -> Lanes:
        return self._where(condition, tensor, other, self._kind)

    def _where(self, condition: Any, tensor: Any, other: Any, kind: str) -> Lanes:
        return self.statements.elementwise(
            functools.partial(self.statements.where, kind=kind), kind, condition, tensor, other
        )

    # Random tensors

    def _draw(self, size: Sequence[int], method: str, *arguments: float) -> Lanes:
        if tuple(size[:1]) != (self._n_rows,):
            raise Unsupported("random numbers that all rows share")
        if self._n_drawn_if:  # the number of those before depends on what happens
            if method != "uniform_" or math.prod(size) != self._n_rows:
                raise Unsupported("other random numbers after some that are not always drawn")
            low, high = arguments
            return self.add(self._elementwise("mul", self._next(size, True), high - low), low)
        self.draws.append((tuple(size), method, arguments))
        return self.statements.inputs(f"draw{len(self.draws) - 1}", (1, *size[1:]), 0, self._n_rows, self._kind)

    def draw_if(self, is_due: Lanes, like: Lanes) -> Lanes:
        if math.prod(like.shape) != self._n_rows:
            raise Unsupported("several random numbers of a row that are not always drawn")
        return self._next(like.shape, is_due.values[()])

    def draw_in_mask(self, mask: Lanes, size: Sequence[int], method: str) -> Lanes:
        if self._n_drawn_if:
            raise Unsupported("other random numbers after some that are not always drawn")
        self.masks[len(self.draws)] = mask
        return self._draw(size, method, 0.0, 1.0)

    def first_in_mask(self, tensor: Lanes, mask: Lanes) -> Lanes:
        self.firsts.append((tensor, mask))
        name, shape = f"first{len(self.firsts) - 1}", (1, *tensor.shape[1:])
        return self.statements.inputs(name, shape, None, self._n_rows, tensor.kind)

    def _next(self, size: Sequence[int], is_due: Any) -> Lanes:
        """The next of the numbers that are not always drawn, ``[n, 1, ...]``."""
        values = np.empty((1,) * len(size), object)
        values.flat[0] = self.statements.add("drawn_if", "f", f"draw{len(self.draws)}", self._used)
        self._n_drawn_if += 1
        self._used = self.statements.apply("add", "i", "i", self._used, is_due)
        return Lanes(values, 0, self._n_rows, "f")

    def uniform(self, tensor: Lanes, low: float = 0.0, high: float = 1.0, **_: Any) -> Lanes:
        return self._draw(tensor.shape, "uniform_", low, high)

    def rand(self, size: Sequence[int], **_: Any) -> Lanes:
        return self._draw(size, "uniform_", 0.0, 1.0)

    def randn(self, size: Sequence[int], **_: Any) -> Lanes:
        return self._draw(size, "normal_", 0.0, 1.0)

    # Reductions

    def _reduce(self, tensor: Lanes, dim: Any, keepdim: bool, operation: str, kind: str) -> Lanes:
        dims = dims_of(dim, tensor.ndim)
        if tensor.axis in dims:
            raise Unsupported(f"{operation} over rows")
        combine = functools.partial(self.statements.apply, operation, kind, kind)
        moved = np.moveaxis(tensor.values, dims, range(len(dims)))
        values = np.empty(moved.shape[len(dims) :], object)
        for place in np.ndindex(*values.shape):
            parts = moved[(*[slice(None)] * len(dims), *place, ...)].flat  # an array, also of one number
            values[place] = functools.reduce(combine, [self.statements.convert(part, kind) for part in parts])
        axis = without(tensor.axis, dims)
        if keepdim:
            values, axis = np.expand_dims(values, tuple(dims)), tensor.axis
        return Lanes(values, axis, self._n_rows, kind)

    def sum(self, tensor: Lanes, dim: Any = None, keepdim: bool = False, **_: Any) -> Lanes:
        return self._reduce(tensor, dim, keepdim, "add", self._kind)

    def mean(self, tensor: Lanes, dim: Any = None, keepdim: bool = False, **_: Any) -> Lanes:
        count = math.prod(tensor.shape[d] for d in dims_of(dim, tensor.ndim))
        return self._elementwise("div", self._reduce(tensor, dim, keepdim, "add", self._kind), count)

    def linalg_vector_norm(
        self, tensor: Lanes, ord: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
    ) -> Lanes:
        if ord != 2:
            raise Unsupported(f"a norm with ord={ord}")
        squares = self._elementwise("mul", tensor, tensor)
        return self._elementwise("sqrt", self._reduce(squares, dim, keepdim, "add", self._kind))

    def any(self, tensor: Any, dim: Any = None, keepdim: bool = False) -> Lanes:
        return self._any_or_all(tensor, dim, keepdim, "or")

    def all(self, tensor: Any, dim: Any = None, keepdim: bool = False) -> Lanes:
        return self._any_or_all(tensor, dim, keepdim, "and")

    def _any_or_all(self, tensor: Any, dim: Any, keepdim: bool, operation: str) -> Lanes:
        if isinstance(tensor, _Pairs):
            if dim != 1 or keepdim or tensor.row.ndim != 2 or tensor.column.ndim != 1:
                raise Unsupported("rows are combined with other rows")
            of_column = self._any_or_all(tensor.column, 0, False, operation)
            return self._elementwise("and", self.squeeze(tensor.row, 1), of_column, kind="b")
        dims = dims_of(dim, tensor.ndim)
        others = [d for d in dims if d != tensor.axis]
        if others or not dims:
            tensor = self._reduce(tensor, others, True, operation, "b")
        if tensor.axis in dims:
            is_any = operation == "or"  # all rows have it if not any row lacks it
            tensor = tensor if is_any else self.logical_not(tensor)
            tensor = self._reduce(Lanes(tensor.values, None, self._n_rows, "b"), tensor.axis, True, "or", "b")
            tensor = self.statements.elementwise(self.statements.any_row, "b", tensor)
            tensor = tensor if is_any else self.logical_not(tensor)
        return (
            tensor
            if keepdim
            else self._view(tensor, np.squeeze(tensor.values, tuple(dims)), without(tensor.axis, dims))
        )

    def if_any_near(self, near: Lanes, force: Lanes, value: Lanes) -> Lanes:
        is_force = self._any_or_all(self._compare("ne", force, 0.0), -1, False, "or")
        matters = self._elementwise("and", is_force, self.logical_not(near), kind="b")  # where near, it is known
        any_near = self.statements.elementwise(self.statements.any_row, "b", near, matters)
        holds = self._elementwise("or", near, any_near, kind="b")
        return self._where(self.unsqueeze(holds, -1), value, 0.0, value.kind)

    def min(self, tensor: Lanes, dim: Any = None, keepdim: bool = False) -> Any:
        return self._extremum(tensor, dim, keepdim, "min", "lt")

    def max(self, tensor: Lanes, dim: Any = None, keepdim: bool = False) -> Any:
        return self._extremum(tensor, dim, keepdim, "max", "gt")

    def _extremum(self, tensor: Lanes, dim: Any, keepdim: bool, operation: str, better: str) -> Any:
        if dim is None:
            return self._reduce(tensor, None, False, operation, tensor.kind)
        best, *others = self.unbind(tensor, dim)
        index = self._full(best.shape, 0, "i")
        for position, other in enumerate(others, 1):
            is_better = self._compare(better, other, best)
            if tensor.kind == "f":  # the first NaN is the result, as PyTorch has it
                is_nan = self._elementwise("and", self.isnan(other), self.logical_not(self.isnan(best)), kind="b")
                is_better = self._elementwise("or", is_better, is_nan, kind="b")
            best = self._where(is_better, other, best, tensor.kind)
            index = self._where(is_better, position, index, "i")
        return tuple(self.unsqueeze(each, dim % tensor.ndim) if keepdim else each for each in (best, index))

    def scatter(self, tensor: Lanes, dim: int, index: Lanes, value: Any) -> Lanes:
        dim %= tensor.ndim
        is_narrower = any(a != b for d, (a, b) in enumerate(zip(index.shape, tensor.shape, strict=True)) if d != dim)
        if index.shape[dim] != 1 or is_narrower or (isinstance(value, Lanes) and value.shape != index.shape):
            raise Unsupported("scatter of several entries")
        value = self._drop(value, dim) if isinstance(value, Lanes) else value
        parts = []
        for position in range(tensor.shape[dim]):
            hit = self._compare("eq", self._drop(index, dim), position)
            parts.append(self._where(hit, value, self.select(tensor, dim, position), tensor.kind))
        return self.stack(parts, dim)

    def argmax(self, tensor: Lanes, dim: Any = None, keepdim: bool = False) -> Lanes:
        return self.max(tensor, dim, keepdim)[1]

    def argmin(self, tensor: Lanes, dim: Any = None, keepdim: bool = False) -> Lanes:
        return self.min(tensor, dim, keepdim)[1]

    def gather(self, tensor: Lanes, dim: int, index: Lanes, **_: Any) -> Lanes:
        (dim,) = dims_of(dim, tensor.ndim)
        differ = [d for d, sizes in enumerate(zip(tensor.shape, index.shape, strict=True)) if len({*sizes}) > 1]
        if dim == tensor.axis or not set(differ) <= {dim}:
            raise Unsupported("gather of some entries")
        result, *others = (self.unsqueeze(part, dim) for part in self.unbind(tensor, dim))
        for position, other in enumerate(others, 1):
            result = self._where(self._compare("eq", index, position), other, result, tensor.kind)
        return result

    # Products

    def linalg_solve_triangular(
        self, matrix: Lanes, right: Lanes, *, upper: bool, left: bool = True, unitriangular: bool = False
    ) -> Lanes:
        if upper or not left or unitriangular:
            raise Unsupported("a triangular solve of another kind than L x = b")
        found: list[Lanes] = []
        for row, (of_matrix, rest) in enumerate(zip(self.unbind(matrix, -2), self.unbind(right, -2), strict=True)):
            for column, solved in enumerate(found):
                factor = self.unsqueeze(self.select(of_matrix, -1, column), -1)
                rest = self._elementwise("sub", rest, self._elementwise("mul", factor, solved))
            diagonal = self.unsqueeze(self.select(of_matrix, -1, row), -1)
            found.append(self._elementwise("div", rest, diagonal))
        return self.stack(found, -2)

    def bmm(self, tensor: Lanes, other: Lanes) -> Lanes:
        products = self._elementwise("mul", self.unsqueeze(tensor, 3), self.unsqueeze(other, 1))
        return self._reduce(products, 2, False, "add", self._kind)

    def _cdist_forward(self, tensor: Lanes, other: Lanes, p: float, compute_mode: Any) -> Lanes:
        differences = self._elementwise("sub", self.unsqueeze(tensor, -2), self.unsqueeze(other, -3))
        return self.linalg_vector_norm(differences, p, -1)
