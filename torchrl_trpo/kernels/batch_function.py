"""Functions of a batch whose results are sums over its rows, such as gradients, compiled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._decomp import get_decompositions

from torchrl_trpo.kernels.buffers import NotCompiled, unused_size
from torchrl_trpo.kernels.compiler import Function
from torchrl_trpo.kernels.cpp import ROWS_AT_A_TIME, source
from torchrl_trpo.kernels.lanes import DTYPES, KINDS, Items, Lane, Statements, Unsupported
from torchrl_trpo.kernels.record import record
from torchrl_trpo.kernels.sums import OverRows, SumOperations, is_of_rows
from torchrl_trpo.kernels.writer import Store

_ROWS = 1024  # are computed at a time, so that what is written of them stays in a core's cache
_STRIDE = _ROWS + ROWS_AT_A_TIME  # between lanes: a power of two would put them all into the same lines of the cache
_MOST_THREADS = 2  # of PyTorch's, with which it would not be faster
_LOSSES = ("mse_loss", "smooth_l1_loss")
_BACKWARD = ("tanh", "softplus", "threshold", "sigmoid", "silu", "elu", "leaky_relu", "select", "slice", *_LOSSES)
_SOFTMAX = ("_log_softmax_backward_data", "_softmax_backward_data")
_NLL = tuple(f"nll_loss{of}_{way}" for of in ("", "2d") for way in ("forward", "backward"))
_DECOMPOSED = (*_LOSSES, *(f"{name}_backward" for name in _BACKWARD), *_SOFTMAX, *_NLL)
_TOLERANCE = 1e-4  # of the largest number


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """What stands for operations that would need methods of their own."""
    return get_decompositions([getattr(torch.ops.aten, name) for name in _DECOMPOSED])


class Blocks:
    """Tensors ``[N, *shape]`` as lanes, in blocks of rows.

    Args:
        tensors: the tensors.

    Attributes:
        sizes: the number of rows in each block.
        addresses: where the tensors' lanes are, ``[n_blocks, n_tensors]``.

    Raises:
        NotCompiled: if a tensor's dtype is not known here.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        n = len(tensors[0])
        n_whole, left = divmod(n, _ROWS)
        self.sizes = [_ROWS] * n_whole + [left] * bool(left)
        self.addresses = np.empty((len(self.sizes), len(tensors)), np.uint64)
        self._buffers = []  # keeps alive what the addresses are of
        for number, tensor in enumerate(tensors):
            if tensor.dtype not in KINDS:
                raise NotCompiled(f"a tensor is of {tensor.dtype}")
            rows = tensor.reshape(n, -1)
            buffer = rows.new_empty(len(self.sizes), rows.shape[1], _STRIDE)
            if n_whole:
                buffer[:n_whole, :, :_ROWS] = rows[: n_whole * _ROWS].unflatten(0, (n_whole, _ROWS)).mT
            if left:
                last = buffer[-1]
                last.narrow(1, 0, left).copy_(rows.narrow(0, n_whole * _ROWS, left).T)
                last.narrow(1, left, ROWS_AT_A_TIME).zero_()
            self._buffers.append(buffer)
            block = buffer.stride(0) * buffer.element_size()
            self.addresses[:, number] = [buffer.data_ptr() + place * block for place in range(len(self.sizes))]


class BatchFunction:
    """A function of a batch, compiled.

    It is traced on a few rows. Nothing in it may depend on the number of rows, such as a mean: that would be a wrong
    number, so compare it with the function on another number of rows.

    Args:
        function: from tensors that all rows share, and tensors ``[N, *shape]``, to a list of tensors: reductions over
            the rows and what follows from them, or ``[N, *shape]``.
        shared: tensors like the former.
        rows: tensors like the latter.
        constants: other tensors that it may read: the caller makes sure that their values stay. Default: all others.

    Raises:
        NotCompiled: if it combines rows in another way, has an operation or a dtype that is not known here, or the
            compiler fails.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
        shared: Sequence[Tensor],
        rows: Sequence[Tensor],
        constants: Sequence[Tensor] | None = None,
    ) -> None:
        if torch.get_num_threads() > _MOST_THREADS:
            raise NotCompiled(f"PyTorch has {torch.get_num_threads()} threads here, and compiled functions use one")
        n = unused_size([*shared, *rows])
        some = [tensor[torch.arange(n) % len(tensor)] for tensor in rows]
        traced = record(function, list(shared), some, decompositions=_decompositions())
        traced.graph.eliminate_dead_code()
        operations = SumOperations(traced, n, constants)
        inputs = [*((tensor, None) for tensor in shared), *((tensor, 0) for tensor in some)]
        try:
            lowered = operations.lower([(str(place), *each) for place, each in enumerate(inputs)])
            self._rest = operations.rest(lowered.outputs)
            self._no_rows = [tensor.new_empty(0, *tensor.shape[1:]) for tensor in rows]
            self._reductions = list(operations.reductions.values())
            stores = self._place_reductions(lowered.statements)
            self._of_rows = [_of_rows(value) for value in lowered.outputs]
            pairs = zip(lowered.outputs, self._of_rows, strict=True)
            with_rows = [(value.kind, lanes) for value, lanes in pairs if lanes is not None]
            for buffer, (kind, lanes) in enumerate(with_rows, 1):
                for place, lane in enumerate(lanes.flat):
                    stores.append(Store(lowered.statements.convert(lane, kind), kind, buffer, place, True))
        except Unsupported as error:
            raise NotCompiled(str(error)) from error
        if lowered.draws:
            raise NotCompiled("it draws random numbers")
        self._results = [(DTYPES[kind], lanes.shape[1:]) for kind, lanes in with_rows]
        places = {str(place): (place, 0) for place in range(len(inputs))}
        self._run = Function(source(lowered.statements.all, places, stores, []))

    def _place_reductions(self, statements: Statements) -> list[Store]:
        """Finds a place in memory for what is reduced; numbers that two reductions read have one."""
        places: dict[tuple[Any, ...], int] = {}
        stores: list[Store] = []
        n_lanes = 0
        self._operands = []  # for each reduction, the place and shape of its operands
        for reduction in self._reductions:
            own = []
            for operand in reduction.operands:
                lanes = tuple(operand.flat)
                if lanes not in places:
                    places[lanes] = n_lanes
                    stores += _stores(statements, lanes, n_lanes)
                    n_lanes += len(lanes)
                own.append((places[lanes], operand.shape))
            self._operands.append(own)
        self._lanes = torch.empty(n_lanes, _STRIDE, dtype=torch.float32)
        self._views: dict[int, list[list[Tensor]]] = {}  # what is reduced, by the number of rows
        return stores

    def __call__(self, shared: Sequence[Tensor], *blocks: Blocks) -> list[Tensor]:
        """Calls the function.

        Args:
            shared: the tensors that all rows share.
            *blocks: the tensors with rows, one after the other.

        Returns:
            The results.

        Raises:
            ValueError: if a whole number is beyond 2**23.
        """
        shared = [tensor.contiguous() for tensor in shared]
        n_rows = sum(blocks[0].sizes)
        results = [torch.empty(n_rows, *shape, dtype=dtype) for dtype, shape in self._results]
        strides = np.array([0, *(math.prod(shape) for _, shape in self._results)], np.int64)
        outputs = np.array([each.data_ptr() for each in (self._lanes, *results)], np.uint64)
        block = np.array([0, *(each.stride(0) * each.element_size() * _ROWS for each in results)], np.uint64)
        inputs = np.array([tensor.data_ptr() for tensor in shared] + [0] * len(self._no_rows), np.uint64)
        totals: list[Any] = [None] * len(self._reductions)
        for number, size in enumerate(blocks[0].sizes):
            inputs[len(shared) :] = np.concatenate([each.addresses[number] for each in blocks])
            if not self._run(size, _STRIDE, inputs.ctypes.data, outputs.ctypes.data, strides.ctypes.data):
                raise ValueError("a whole number is beyond 2**23, with which compiled functions cannot compute.")
            outputs += block
            operands = self._operands_of(size)
            totals = [_reduced(*each) for each in zip(self._reductions, operands, totals, strict=True)]
        totals = [total.reshape(reduction.shape) for total, reduction in zip(totals, self._reductions, strict=True)]
        rest, with_rows = iter(self._rest.forward(*shared, *self._no_rows, *totals)), iter(results)
        return [next(rest if lanes is None else with_rows) for lanes in self._of_rows]

    def _operands_of(self, size: int) -> list[list[Tensor]]:
        """What is reduced of a block of as many rows."""
        if size not in self._views:
            self._views[size] = []
            for operands in self._operands:
                views = [
                    self._lanes[first : first + math.prod(shape)].view(*shape, _STRIDE)[..., :size]
                    for first, shape in operands
                ]
                self._views[size].append(views)
        return self._views[size]


def check_results(
    results: Sequence[Tensor], function: Callable[..., Sequence[Tensor]], *given: Sequence[Tensor]
) -> None:
    """Compares a compiled function's results with those of what it stands for, in double precision.

    They may be as far from those as rounding is, that of its operations and that of its inputs.

    Args:
        results: the results.
        function: what it stands for.
        *given: the lists of tensors that it takes.

    Raises:
        NotCompiled: if they are further off.
    """
    plain = function(*given)
    exact, others = (function(*(_double(each, change) for each in given)) for change in (0.0, 2.0**-23))
    for value, *rounded, right in zip(results, plain, others, exact, strict=True):
        spread = max((each - right).abs().max() for each in rounded)
        bound = _TOLERANCE * right.abs().max() + 4 * spread
        if value.shape != right.shape or not bool(((value - right).abs() <= bound).all()):
            raise NotCompiled("its results are not what they should be")


def _double(tensors: Sequence[Tensor], change: float) -> list[Tensor]:
    """Tensors in double precision, with their numbers changed by a share of themselves."""
    return [tensor.double() * (1 + change) if tensor.is_floating_point() else tensor for tensor in tensors]


def _of_rows(value: Any) -> Any:
    """The lanes of a result with rows; None for another."""
    if not is_of_rows(value):
        return None
    if value.axis != 0:
        raise Unsupported("a result has its rows in another dimension than the first")
    return value.values


def _reduced(reduction: OverRows, operands: Sequence[Tensor], total: Tensor | None) -> Tensor:
    """The reduction of a block of rows, and of those before it."""
    if reduction.operation == "product":
        left, right = (each.reshape(-1, each.shape[-3], each.shape[-2] * each.shape[-1]) for each in operands)
        return torch.bmm(left, right.mT) if total is None else total.baddbmm_(left, right.mT)
    if reduction.operation == "sum":
        return operands[0].sum(-1) if total is None else total.add_(operands[0].sum(-1))
    return operands[0].amax(-1) if total is None else torch.maximum(total, operands[0].amax(-1))


def _stores(statements: Statements, lanes: Sequence[Any], first: int) -> list[Store]:
    """Stores of lanes one after the other; one for all items that are next to each other."""
    stores: list[Store] = []
    for place, lane in enumerate(lanes, first):
        statement = statements.all[lane.number] if isinstance(lane, Lane) else None
        if statement is None or statement.operation != "item":
            stores.append(Store(lane, "f", 0, place))
            continue
        items, last = statement.arguments[0], stores[-1].value if stores else None
        if isinstance(last, Items) and (last.block, last.first + last.length) == (items.block, items.first):
            stores[-1] = stores[-1]._replace(value=last._replace(length=last.length + 1))
        else:
            stores.append(Store(items, "f", 0, place))
    return stores
