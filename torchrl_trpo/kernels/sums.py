"""Functions of a batch whose results are sums over its rows, such as gradients, as statements for one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from torchrl_trpo.kernels.lanes import Lanes, Unsupported
from torchrl_trpo.kernels.networks import Joined, NetworkOperations, name_of
from torchrl_trpo.kernels.views import dims_of

_LIKE = {"ones_like", "zeros_like", "full_like", "empty_like", "new_zeros"}  # read the shape of a tensor alone


class OverRows(NamedTuple):
    """A reduction over the rows of a batch.

    Attributes:
        operation: ``sum`` or ``max``, of one operand ``[*shape]``; or ``product``: from ``[*B, K, J]`` and
            ``[*B, M, J]`` to the sums over rows and ``J`` of their products, ``[*B, K, M]``.
        operands: the numbers of each row.
        shape: the shape of the result.
    """

    operation: str
    operands: tuple[np.ndarray, ...]
    shape: tuple[int, ...]


class _Later:
    """A tensor that is known when the loop over the rows is done."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)


class _Turned(NamedTuple):
    """The transpose of joined rows."""

    joined: Joined


class SumOperations(NetworkOperations):
    """The operations of ``torch.ops.aten`` in a function of a batch, as methods; it may end in reductions over rows.

    Args:
        graph: the graph.
        n_rows: the size of the batch.
        constants: the tensors that it holds and may read. Default: all.

    Attributes:
        reductions: by the node of the graph.
    """

    def __init__(self, graph: fx.GraphModule, n_rows: int, constants: Sequence[Tensor] | None = None) -> None:
        super().__init__(graph, n_rows, {}, constants)
        self.reductions: dict[fx.Node, OverRows] = {}

    def rest(self, outputs: Sequence[Any]) -> fx.GraphModule:
        """What is left to do when the loop is done, for :meth:`lower`'s ``outputs``.

        Returns:
            From the inputs of the graph, those with rows without any, followed by the results of the reductions, to the
            outputs that are none of each row.
        """
        graph, nodes = fx.Graph(), self._graph.graph.nodes
        copies = {node: graph.placeholder(node.name) for node in nodes if node.op == "placeholder"}
        copies |= {node: graph.placeholder(f"reduced{number}") for number, node in enumerate(self.reductions)}
        results: Any = self._graph.graph.output_node().args[0]
        wanted = [node for node, value in zip(results, outputs, strict=True) if not is_of_rows(value)]
        needed = {*wanted}
        for node in reversed(nodes):
            if node in needed and node not in copies:
                needed.update(node.all_input_nodes)
        for node in nodes:
            if node in needed and node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[node] for node in wanted])
        return fx.GraphModule(self._graph, graph)

    def _call(self, node: fx.Node, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        name = name_of(node)
        self._node = node
        given = tree_leaves([arguments, keywords])
        if any(isinstance(each, _Later) for each in given):
            if name not in _LIKE:
                if any(is_of_rows(each) for each in given):
                    raise Unsupported("what is computed of all rows is needed for each")
                return _Later(_shape_of(node))
            arguments = [self._full(each.shape, 0, "f") if isinstance(each, _Later) else each for each in arguments]
        return super()._call(node, arguments, keywords)

    def t(self, tensor: Any) -> Any:
        if isinstance(tensor, Joined):
            return _Turned(tensor)
        return tensor.joined if isinstance(tensor, _Turned) else super().t(tensor)

    def mm(self, tensor: Any, weights: Any) -> Any:
        if isinstance(tensor, _Turned) and isinstance(weights, Joined):  # [K, n * J] and [n * J, M]
            return self._over_rows("product", _joined_last(tensor.joined), _joined_last(weights))
        if isinstance(tensor, Lanes) and tensor.axis == 1 and isinstance(weights, Lanes) and weights.axis == 0:
            return self._over_rows("product", tensor.values, weights.values.T)
        return super().mm(tensor, weights)

    def bmm(self, tensor: Lanes, weights: Lanes) -> Any:
        if tensor.axis == 2 and weights.axis == 1:
            return self._over_rows("product", tensor.values, weights.values.transpose(0, 2, 1))
        return super().bmm(tensor, weights)

    def sum(self, tensor: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        if not isinstance(tensor, Joined):
            return super().sum(tensor, dim, keepdim)
        if dims_of(dim, 2) != [0]:
            raise Unsupported("a sum of rows that are joined with another dimension")
        between = list(range(1, tensor.lanes.ndim - 1))
        return self._over_rows("sum", super()._reduce(tensor.lanes, between, False, "add", "f").values)

    def mean(self, tensor: Lanes, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        dims = dims_of(dim, tensor.ndim)
        if tensor.axis not in dims:
            return super().mean(tensor, dim, keepdim)
        share = self._elementwise("div", tensor, math.prod(tensor.shape[each] for each in dims))
        return self._reduce(share, dim, keepdim, "add", self._kind)

    def amax(self, tensor: Lanes, dim: Any = None, keepdim: bool = False) -> Any:
        return self._reduce(tensor, dim, keepdim, "max", tensor.kind)

    def _reduce(self, tensor: Lanes, dim: Any, keepdim: bool, operation: str, kind: str) -> Any:
        dims = dims_of(dim, tensor.ndim)
        if tensor.axis not in dims or operation not in {"add", "max"} or kind != "f":
            return super()._reduce(tensor, dim, keepdim, operation, kind)
        others = [each for each in dims if each != tensor.axis]
        if others:
            tensor = super()._reduce(tensor, others, True, operation, kind)
        return self._over_rows("sum" if operation == "add" else "max", tensor.values)

    def _over_rows(self, operation: str, *operands: np.ndarray) -> _Later:
        convert = np.vectorize(lambda value: self.statements.convert(value, "f"), otypes=[object])
        reduction = OverRows(operation, tuple(convert(each) for each in operands), _shape_of(self._node))
        self.reductions[self._node] = reduction
        return _Later(reduction.shape)


def is_of_rows(value: Any) -> bool:
    """Whether a value is one for each row."""
    return isinstance(value, Lanes) and value.axis is not None


def _joined_last(tensor: Joined) -> np.ndarray:
    """The numbers of a row ``[K, J]``, of joined rows ``[n * J, K]``."""
    values = tensor.lanes.values
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1]).T


def _shape_of(node: fx.Node) -> tuple[int, ...]:
    shape = getattr(node.meta.get("val"), "shape", None)
    return () if shape is None else tuple(shape)  # several tensors have none
