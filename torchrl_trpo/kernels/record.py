"""Recording the operations of a function as a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

NEW = torch.ops.aten.lift_fresh_copy.default
"""Makes a new tensor of Python's numbers, at each call of a graph."""
_LISTS = {"numpy", "tolist", "__array__"}


def record(
    function: Callable[..., Any],
    *arguments: Any,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """The operations of ``torch.ops.aten`` that a function of tensors calls, as ``make_fx`` records them.

    It is several times as fast as ``make_fx``: nothing is symbolic, and a node only has its result's shape and dtype.
    There is a ``RuntimeError`` where Python reads a value that may be another at the next call.

    Args:
        function: the function.
        *arguments: tensors, or lists of tensors, that it is called with.

    Keyword Args:
        decompositions: what takes the place of some operations.

    Returns:
        The graph, of all the tensors one after the other. Other tensors that the function reads are its attributes.
    """
    recorder = _Recorder(decompositions or {})
    for tensor in tree_leaves(arguments):
        recorder.follow(tensor, recorder.graph.placeholder(f"argument{len(recorder.graph.nodes)}"))
    with _NoLists(recorder), recorder:
        results = function(*arguments)
    recorder.graph.output(tree_map(recorder.node_of, results))
    return fx.GraphModule(recorder.attributes, recorder.graph)


class _Recorder(TorchDispatchMode):
    def __init__(self, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor] = {}
        self._decompositions = decompositions
        self._nodes = WeakTensorKeyDictionary()  # what each tensor is in the graph
        self._constants: set[fx.Node] = set()  # computed of Python's numbers alone
        self._has_written = False  # then a tensor may share its memory with another that is no constant

    def follow(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["val"] = torch.empty_like(tensor, device="meta")
        self._nodes[tensor] = node

    def node_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value not in self._nodes:
            name = f"constant{len(self.attributes)}"
            self.attributes[name] = value
            self.follow(value, self.graph.create_node("get_attr", name))
        return self._nodes[value]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            decompose = self._decompositions.get(func, func.decompose)
            results = decompose(*args, **kwargs)
        if results is not NotImplemented:
            return results
        nodes, named = tree_map(self.node_of, (tuple(args), kwargs))
        results = func(*args, **kwargs)
        leaves = tree_leaves((nodes, named))
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise RuntimeError(f"{func} draws random numbers from a generator of its own")
        if _has_shape_of_values(func, args) or torch.Tag.data_dependent_output in func.tags:
            read = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and leaf.op != "get_attr"]
            if self._has_written or not self._constants.issuperset(read):
                raise RuntimeError(f"Python reads a tensor's value, by {func}")
        if torch.Tag.data_dependent_output in func.tags:
            return results
        self._has_written |= func._schema.is_mutable
        # A new tensor of Python's numbers is a constant here, and new at each call of the graph.
        node = self._call(NEW if func is torch.ops.aten.lift_fresh.default else func, nodes, named)
        if isinstance(results, Tensor):
            self.follow(results, node)
        for number, result in enumerate(results if isinstance(results, (list, tuple)) else []):
            if isinstance(result, Tensor):
                self.follow(result, self._call(operator.getitem, (node, number)))
        return results

    def _call(self, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        if target is NEW or (self._constants.issuperset(node.all_input_nodes) and not node.is_impure()):
            self._constants.add(node)
        return node

    def is_known(self, tensor: Tensor) -> bool:
        """Whether a tensor has the same numbers at each call, as far as is known here."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        return tensor not in self._nodes or (not self._has_written and self._nodes[tensor] in self._constants)


class _NoLists(TorchFunctionMode):
    """Refuses to make NumPy arrays and lists of tensors: the recorder does not see what is computed with them."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in _LISTS and not self._recorder.is_known(args[0]):
            raise RuntimeError(f"Python reads a tensor's value, by {func.__name__}: it computes with NumPy or lists")
        return func(*args, **(kwargs or {}))


def _has_shape_of_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether the shape of an operation's result depends on the numbers in its arguments."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags
