"""The operations of networks and distributions: layers with weights that are known at run time, activations, draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from torchrl_trpo.kernels.aten import Operations
from torchrl_trpo.kernels.lanes import KINDS, InMemory, Items, Lane, Lanes, Unsupported, aligned
from torchrl_trpo.kernels.record import NEW
from torchrl_trpo.kernels.settings import is_fixed
from torchrl_trpo.kernels.views import dims_of

_LONG = 16
"""From how many entries on one statement stands for all of them."""


def name_of(node: fx.Node) -> str:
    """The name of a node's operation."""
    return getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")


class Joined(NamedTuple):
    """A tensor ``[n * ..., K]``: one ``[n, ..., K]`` whose dimensions but the last have been made one."""

    lanes: Lanes


class NetworkOperations(Operations):
    """The operations of ``torch.ops.aten`` in a network and its distribution, as methods.

    Args:
        graph: the graph.
        n_rows: the size of the batch.
        parameters: the tensors of the graph that may have other values in each call, by name.
        constants: the others that it may read: the caller makes sure that their values stay. Default: all others.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        n_rows: int,
        parameters: Mapping[str, Tensor],
        constants: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(graph, n_rows)
        self._parameters = parameters
        self._constants = None if constants is None else {each.untyped_storage().data_ptr() for each in constants}
        self._lanes: dict[str, Lanes] = {}

    def attribute(self, node: fx.Node) -> Lanes:
        tensor: Any = getattr(self._graph, node.target)  # type: ignore[arg-type]
        for name, parameter in self._parameters.items():
            first = tensor.storage_offset() - parameter.storage_offset()
            is_part = 0 <= first < parameter.numel()
            if is_part and tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
                if name not in self._lanes:
                    shape, kind = (parameter.numel(),), KINDS[tensor.dtype]
                    self._lanes[name] = self.statements.inputs(name, shape, None, self._n_rows, kind)
                places = torch.arange(parameter.numel()).as_strided(tensor.shape, tensor.stride(), first)
                values = self._lanes[name].values[places.flatten().numpy()].reshape(tuple(tensor.shape))
                return Lanes(values, None, self._n_rows, KINDS[tensor.dtype])
        is_new = all(user.target is NEW for user in node.users)  # the function makes it of Python's numbers
        is_constant = self._constants is None or tensor.untyped_storage().data_ptr() in self._constants
        if not is_constant and not is_new and not is_fixed(tensor):
            raise Unsupported(
                f"it reads a tensor of shape {tuple(tensor.shape)} that is no parameter and no buffer of its modules: "
                "make it a buffer of one"
            )
        return super().attribute(node)

    def _call(self, node: fx.Node, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        name = name_of(node)
        if any(isinstance(each, Joined) for each in arguments) and name not in _OF_JOINED:
            return self._of_joined(name, node, arguments, keywords)
        if name.endswith("_") and (len(node.all_input_nodes[0].users) > 1 or not _is_new(node.all_input_nodes[0])):
            raise Unsupported(f"{name} of a tensor that is read besides")
        return super()._call(node, arguments, keywords)

    def _of_joined(self, name: str, node: fx.Node, arguments: Sequence[Any], keywords: dict[str, Any]) -> Joined:
        """An operation on each number of joined rows, and of what all of them share."""
        joined = {each.lanes.shape[:-1] for each in arguments if isinstance(each, Joined)}
        if name not in _FOR_EACH or len(joined) > 1:
            raise Unsupported(f"{name} of rows that are joined with another dimension")
        plain = [each.lanes if isinstance(each, Joined) else _of_all(each) for each in arguments]
        return Joined(super()._call(node, plain, keywords))

    def view(self, tensor: Any, size: Sequence[int]) -> Any:
        lanes = tensor.lanes if isinstance(tensor, Joined) else tensor
        if lanes.axis == 0 and lanes.ndim > 2 and len(size) == 2:
            joined = math.prod(lanes.shape[:-1]), lanes.shape[-1]
            if joined[0] != self._n_rows and list(size) in ([*joined], [-1, joined[1]], [joined[0], -1]):
                return Joined(lanes)
        return super().view(lanes, size)

    reshape = _unsafe_view = view

    def permute(self, tensor: Any, dims: Sequence[int]) -> Any:
        if not isinstance(tensor, Joined):
            return super().permute(tensor, dims)
        if tensor.lanes.shape[-1] != 1:
            raise Unsupported("a permutation of rows that are joined with another dimension")
        return tensor  # [n * ..., 1] as [1, n * ...]: only a view can follow, for which it is the same

    # Layers

    def mm(self, tensor: Any, weights: Lanes) -> Any:
        if isinstance(tensor, Joined):
            return Joined(self.mm(tensor.lanes, weights))
        if tensor.axis != 0 or weights.axis is not None or tensor.shape[-1] != weights.shape[0]:
            raise Unsupported("a product of rows")
        values = np.empty((*tensor.values.shape[:-1], weights.shape[1]), object)
        for place in np.ndindex(*values.shape[:-1]):
            values[place] = self._linear(tensor.values[place], weights.values)
        return Lanes(values, 0, self._n_rows, "f")

    def addmm(self, bias: Lanes, tensor: Any, weights: Lanes, beta: Any = 1, alpha: Any = 1) -> Any:
        if (beta, alpha) != (1, 1):
            raise Unsupported("a product that is scaled")
        product = self.mm(tensor, weights)
        lanes = product.lanes if isinstance(product, Joined) else product
        total = self._elementwise("add", lanes, bias)
        return Joined(total) if isinstance(product, Joined) else total

    def bmm(self, tensor: Lanes, weights: Lanes) -> Lanes:
        if tensor.axis != 1 or weights.axis is not None:
            return super().bmm(tensor, weights)
        values = np.empty((tensor.shape[0], 1, weights.shape[2]), object)
        for number, (inputs, each) in enumerate(zip(tensor.values, weights.values, strict=True)):
            values[number, 0] = self._linear(inputs[0], each)
        return Lanes(values, 1, self._n_rows, "f")

    def _linear(self, inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """A product of ``[K]`` and ``[K, N]``, as one statement; the weights are in memory, at equal distances."""
        columns = [self._column(column) for column in weights.T]
        if not all(isinstance(column, InMemory) for column in columns):
            raise Unsupported("a product with weights that are computed")
        name, first, step = next(iter(columns))
        to_next = columns[1].first - first if len(columns) > 1 else 0
        if columns != [InMemory(name, first + number * to_next, step) for number in range(len(columns))]:
            raise Unsupported("a product with weights that are not at equal distances in memory")
        vector = self._vector(inputs)
        terms = [vector] if isinstance(vector, Items) else [self.statements.convert(value, "f") for value in inputs]
        return self.statements.block("linear", len(columns), "f", name, first, step, to_next, len(columns), *terms)

    def _column(self, values: np.ndarray) -> Any:
        """Weights as a place in memory, if they are in one, also a single one."""
        vector = self._vector(values)
        if len(values) == 1 and isinstance(vector, Lane) and self.statements.all[vector.number].operation == "shared":
            name, first = self.statements.all[vector.number].arguments
            return InMemory(name, first, 1)
        return vector

    def _elementwise(self, operation: str, *tensors: Any, kind: str = "", of: str = "") -> Lanes:
        """As of the base class. Where the last dimension is long, one statement stands for all of its entries."""
        if (kind or self._kind) == "f" and of in ("", "f"):
            arrays, axis, n_rows = aligned(*tensors)
            broadcast = np.broadcast_arrays(*arrays)
            *shape, length = broadcast[0].shape or (1,)
            if length >= _LONG:
                values = np.empty((*shape, length), object)
                places = list(np.ndindex(*shape))
                vectors = [[self._vector(array[place]) for array in broadcast] for place in places]
                if all(vector is not None for each in vectors for vector in each):
                    for place, each in zip(places, vectors, strict=True):
                        values[place] = self.statements.block("map", length, "f", operation, length, *each)
                    return Lanes(values, None if axis is None else values.ndim + axis, n_rows, "f")
        return super()._elementwise(operation, *tensors, kind=kind, of=of)

    def _vector(self, values: np.ndarray) -> Any:
        """Values that are next to each other in memory, or one value that all are; None if they are neither."""
        first = values[0]
        if all(value is first or (value == first and type(value) is type(first)) for value in values):
            return first if isinstance(first, Lane) and first.kind == "f" else self.statements.convert(first, "f")
        if not all(isinstance(value, Lane) and value.kind == "f" for value in values):
            return None
        found = [self.statements.all[value.number] for value in values]
        if all(each.operation == "item" for each in found):
            block, begin, _ = found[0].arguments[0]
            if any(each.arguments[0][:2] != (block, begin + n) for n, each in enumerate(found)):
                return None
            return Items(block, begin, len(found))
        if all(each.operation == "shared" for each in found):
            name, begin = found[0].arguments
            step = found[1].arguments[1] - begin
            if any(each.arguments != (name, begin + n * step) for n, each in enumerate(found)):
                return None
            return InMemory(name, begin, step)
        return None

    # Activations

    def relu(self, tensor: Lanes) -> Lanes:
        return self._elementwise("max", tensor, 0)

    def sigmoid(self, tensor: Lanes) -> Lanes:
        exponential = self._elementwise("exp", self._elementwise("neg", tensor))
        return self._elementwise("reciprocal", self._elementwise("add", exponential, 1))

    def silu(self, tensor: Lanes) -> Lanes:
        return self._elementwise("mul", tensor, self.sigmoid(tensor))

    def elu(self, tensor: Lanes, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Lanes:
        grown = self._elementwise("expm1", self._elementwise("mul", tensor, input_scale))
        below = self._elementwise("mul", grown, alpha * scale)
        return self._where(self._compare("gt", tensor, 0.0), self._elementwise("mul", tensor, scale), below, "f")

    def leaky_relu(self, tensor: Lanes, negative_slope: Any = 0.01) -> Lanes:
        below = self._elementwise("mul", tensor, negative_slope)
        return self._where(self._compare("gt", tensor, 0.0), tensor, below, "f")

    def softplus(self, tensor: Lanes, beta: Any = 1, threshold: Any = 20) -> Lanes:
        scaled = self._elementwise("mul", tensor, beta)
        smooth = self._elementwise("div", self._elementwise("log1p", self._elementwise("exp", scaled)), beta)
        return self._where(self._compare("gt", scaled, float(threshold)), tensor, smooth, "f")

    # Losses

    def masked_fill(self, tensor: Lanes, mask: Lanes, value: Any) -> Lanes:
        return self._where(mask, value, tensor, tensor.kind)

    masked_fill_ = masked_fill

    def _foreach_sub(self, tensors: Sequence[Lanes], others: Sequence[Lanes]) -> list[Lanes]:
        if {each.kind for each in (*tensors, *others)} != {"f"}:
            raise Unsupported("a difference of lists of other numbers")
        return [self._elementwise("sub", *pair, kind="f") for pair in zip(tensors, others, strict=True)]

    # Distributions

    def normal_(self, tensor: Lanes, mean: float = 0.0, std: float = 1.0, **_: Any) -> Lanes:
        return self._draw(tensor.shape, "normal_", mean, std)

    def randint(self, *bounds_and_size: Any, **_: Any) -> Lanes:
        *bounds, size = bounds_and_size
        low, high = bounds if len(bounds) == 2 else (0, *bounds)
        return self._draw(size, "random_", low, high)

    def normal(self, mean: Any, std: Any, **_: Any) -> Lanes:
        size = mean.shape if isinstance(mean, Lanes) else std.shape
        return self.add(self._elementwise("mul", self._draw(size, "normal_", 0.0, 1.0), std), mean)

    def logsumexp(self, tensor: Lanes, dim: Any, keepdim: bool = False) -> Lanes:
        largest = self._reduce(tensor, dim, True, "max", "f")
        exponentials = self._elementwise("exp", self._elementwise("sub", tensor, largest))
        total = self._elementwise("add", self._elementwise("log", self.sum(exponentials, dim, True)), largest)
        return total if keepdim else self.squeeze(total, dim)

    def _log_softmax(self, tensor: Lanes, dim: int, half_to_float: bool = False) -> Lanes:
        return self._elementwise("sub", tensor, self.logsumexp(tensor, [dim], True))

    def _softmax(self, tensor: Lanes, dim: int, half_to_float: bool = False) -> Lanes:
        largest = self._reduce(tensor, dim, True, "max", "f")
        exponentials = self._elementwise("exp", self._elementwise("sub", tensor, largest))
        return self._elementwise("div", exponentials, self.sum(exponentials, dim, True))

    def multinomial(self, tensor: Any, num_samples: int, replacement: bool = False, **_: Any) -> Any:
        """PyTorch draws one sample as the largest of the quotients of probabilities and exponential numbers."""
        if num_samples != 1:
            raise Unsupported("several samples of a multinomial distribution")
        lanes = tensor.lanes if isinstance(tensor, Joined) else tensor
        kind, self._kind = self._kind, "f"
        quotients = self._elementwise("div", lanes, self._draw(lanes.shape, "exponential_", 1.0))
        self._kind = kind
        drawn = self.argmax(quotients, -1, True)
        return Joined(drawn) if isinstance(tensor, Joined) else drawn

    def scatter_add(self, tensor: Lanes, dim: int, index: Lanes, source: Lanes) -> Lanes:
        (dim,) = dims_of(dim, tensor.ndim)
        if dim == tensor.axis or index.shape[dim] != 1 or index.shape != source.shape:
            raise Unsupported("scatter_add of several entries")
        index, source = self._drop(index, dim), self._drop(source, dim)
        parts = []
        for position, part in enumerate(self.unbind(tensor, dim)):
            added = self._where(self._compare("eq", index, position), source, 0.0, "f")
            parts.append(self._elementwise("add", part, added))
        return self.stack(parts, dim)


def _is_new(node: fx.Node) -> bool:
    """Whether a node's tensor shares its memory with no other."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not any(result.alias_info for result in schema.returns)


def _of_all(value: Any) -> Any:
    """A number, or a tensor that all rows share, without the dimension along which it is repeated for them."""
    if not isinstance(value, Lanes) or (value.axis is None and value.ndim < 2):
        return value
    if value.axis is not None or value.ndim > 2 or value.values.strides[0]:
        raise Unsupported("rows that are joined with another dimension, and others")
    return Lanes(value.values[0], None, value.n_rows, value.kind)


_FOR_EACH = {"add", "sub", "mul", "div", "neg", "where", "exp", "log", "sqrt", "tanh"}
_OF_JOINED = {"view", "reshape", "_unsafe_view", "mm", "addmm", "multinomial", "permute", "t", "sum", "detach", "clone"}
