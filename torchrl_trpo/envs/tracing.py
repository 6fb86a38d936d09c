"""A function of a VMAS simulator as a graph of the tensors that its objects hold."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten

from torchrl_trpo.envs.object_graph import kind_of, parts_of, path_of, walk
from torchrl_trpo.envs.snapshot import ObjectSnapshot

_MOST_CALLS = 60_000
"""Of PyTorch's functions in one call of the simulator's; the code for more would take minutes to compile."""


class Untraceable(Exception):
    """A function that no graph stands for, with the reason."""


class Places:
    """Where a simulator holds tensors, and what else it holds.

    Args:
        simulator: the simulator.

    Attributes:
        paths: the names of the places.
        holders: for each place the dict or list that holds the tensor, and its key; None if it cannot be replaced.
        tensors: the tensors.
        containers: the dicts, lists and attributes of objects.
        others: everything else by its path: values without parts, and the types of objects and containers.
    """

    def __init__(self, simulator: Any) -> None:
        self.paths = ["steps"]
        self.holders: list[tuple[Any, Any] | None] = [(vars(simulator), "steps")]
        self.tensors: list[Tensor] = [simulator.steps]
        self.containers: list[Any] = []
        self.others: dict[str, Any] = {}
        for value, place, first in walk([("scenario", simulator.scenario), ("world", simulator.world)]):
            kind, path = kind_of(type(value)), path_of(place)
            if kind == "tensor":
                continue
            self.others[path] = _described(value, kind)
            if first and kind not in {"leaf", "array"}:
                self._add(value, kind, path)

    def _add(self, value: Any, kind: str, path: str) -> None:
        holder = vars(value) if kind == "object" else value if kind in {"dict", "list"} else None
        if holder is not None:
            self.containers.append(holder)
        parts = parts_of(value) if holder is None else holder
        items = parts.items() if isinstance(parts, dict) else enumerate(parts)
        for position, (key, part) in enumerate(items):
            if isinstance(part, Tensor):
                self.paths.append(f"{path}.{key if isinstance(key, str) else position}")
                self.holders.append(None if holder is None else (holder, key))
                self.tensors.append(part)

    def same(self) -> list[int]:
        """For each place the first one that holds the same tensor."""
        first: dict[int, int] = {}
        return [first.setdefault(id(tensor), number) for number, tensor in enumerate(self.tensors)]

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Replaces the tensors."""
        for holder, tensor in zip(self.holders, tensors, strict=True):
            if holder is not None:
                holder[0][holder[1]] = tensor

    def difference(self, other: Places, sizes: tuple[int, int] | None = None) -> str | None:
        """What of another simulator, or of this one at another time, is not as here, besides the tensors' values.

        ``sizes`` are the numbers of environments here and there, which may differ wherever they stand.
        """
        if self.paths != other.paths:
            return f"{next(iter(set(self.paths) ^ set(other.paths)), 'the order of places')} is not there every time"
        if self.same() != other.same():
            return "other places share a tensor"
        for path in {**self.others, **other.others}:
            here, there = self.others.get(path, "nothing"), other.others.get(path, "nothing")
            if here is not there and here != there and (here, there) != sizes and here == here:  # a NaN is like a NaN
                return f"{path} changes from {here!r} to {there!r}"
        return None


def _described(value: Any, kind: str) -> Any:
    """What equals that of another simulator. Types are named: each simulator loads its scenario's module anew."""
    if kind == "array":
        return value.tobytes()
    cls = value if isinstance(value, type) else type(value)
    return value if kind == "leaf" and cls is not value else f"{cls.__module__}.{cls.__qualname__}"


@contextlib.contextmanager
def left_as_it_is(simulator: Any) -> Iterator[None]:
    """Restores what a simulator's objects hold, whatever happens to it inside the context."""
    snapshot, steps = ObjectSnapshot((simulator.scenario, simulator.world), simulator.num_envs), simulator.steps
    try:
        yield
    finally:
        snapshot.restore()
        simulator.steps = steps


class Trace(NamedTuple):
    """A function as a graph. Its inputs are the tensors at the places, then the arguments.

    Attributes:
        graph: the graph, without mutations. Its outputs are the tensors at the places afterwards, then the results,
            then the values that the function branched on.
        before: the places, with the tensors that it was traced with.
        results: the structure of the results, and their number.
        expected: what the values that the function branched on must be for the graph to stand for it.
    """

    graph: fx.GraphModule
    before: Places
    results: TreeSpec
    expected: list[Any]


def trace(simulator: Any, function: Callable[..., Any], arguments: Sequence[Tensor]) -> Trace:
    """Traces a function of a simulator.

    Python decides by the values of tensors at some places: in assertions and in ``if``. The graph has the decisions of
    this call, and gives the values that they were made by. The broad phase of VMAS's collisions is taken as passed: of
    what does not touch, the narrow phase gives a force of zero.

    Args:
        simulator: the simulator; it is left as it was.
        function: the function, of ``arguments``. Its results are tensors in dicts, lists and tuples.
        arguments: tensors.

    Returns:
        The graph.

    Raises:
        Untraceable: if the function changes anything besides tensors, reads tensors in another way, or draws random
            numbers that are not PyTorch's.
    """
    before = Places(simulator)
    generators = _numpys_and_pythons_generator()
    found: dict[str, Any] = {}

    def run(tensors: Sequence[Tensor], arguments: Sequence[Tensor], reads: _Reads) -> list[Tensor]:
        before.put(tensors)
        simulator.world.collides = reads.as_broad_phase(simulator.world.collides)
        with reads:
            results = function(*arguments)
            del simulator.world.collides
            after = Places(simulator)
            if difference := before.difference(after):
                raise Untraceable(difference)
            flat, found["results"] = tree_flatten(results)
            found["expected"] = [expected for _, expected in reads.guards]
            return [*after.tensors, *flat, *(value for value, _ in reads.guards)]

    def copies() -> tuple[list[Tensor], list[Tensor]]:
        cloned = {id(tensor): tensor.clone() for tensor in before.tensors}
        return [cloned[id(tensor)] for tensor in before.tensors], [tensor.clone() for tensor in arguments]

    def replay(tensors: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
        return run(tensors, arguments, _Reads(record.values))

    record = _Reads()
    try:
        with left_as_it_is(simulator), torch.random.fork_rng(devices=[]):
            run(*copies(), record)
        if _numpys_and_pythons_generator() != generators:
            raise Untraceable("it draws random numbers from NumPy or Python")
        with left_as_it_is(simulator), torch.random.fork_rng(devices=[]):
            graph = make_fx(functionalize(replay, remove="mutations"), tracing_mode="real")(*copies())
    except RuntimeError as error:  # a value was read in a way that the tracer refuses
        raise Untraceable(str(error).splitlines()[0]) from error
    _drop_writes_to_inputs(graph, before)
    return Trace(graph, before, found["results"], found["expected"])


def _numpys_and_pythons_generator() -> tuple[Any, ...]:
    state: Any = np.random.get_state()  # noqa: NPY002
    return state[1].tobytes(), *state[2:], random.getstate()


def _drop_writes_to_inputs(graph: fx.GraphModule, before: Places) -> None:
    """Removes what would write new values into the inputs: the values are outputs besides."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    storages = [tensor.untyped_storage().data_ptr() for tensor in before.tensors]
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.copy_.default and node.args[0] in placeholders:
            number = placeholders.index(node.args[0])
            if number < len(storages):
                sharing = {id(t) for t, s in zip(before.tensors, storages, strict=True) if s == storages[number]}
                if len(sharing) > 1:
                    raise Untraceable(
                        f"{before.paths[number]} is written to, and shares its memory with another tensor"
                    )
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item}
_BY_ROW = {  # functions that may be applied to x[mask] row by row
    *("add", "sub", "mul", "div", "true_divide", "rsub", "neg", "abs", "sqrt", "exp", "sin", "cos", "pow", "square"),
    *("minimum", "maximum", "clamp", "where", "norm", "vector_norm", "linalg_vector_norm", "squeeze", "unsqueeze"),
    *("lt", "le", "gt", "ge", "eq", "ne", "to", "float", "long", "int", "bool", "clone"),
    *("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"),
}


class _Reads(TorchFunctionMode):
    """Intercepts how Python reads tensors: records what it reads, or replays it while the function is traced.

    While it replays, ``x[mask]`` with a mask of bools is all of ``x``, whose rows outside of the mask are not used.
    """

    def __init__(self, values: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.values = list(values or [])
        self.guards: list[tuple[Tensor, Any]] = []
        self._replays = values is not None
        self._n_replayed = self._n_calls = 0
        self._is_broad_phase = False
        self._masked: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: x[mask], and the mask

    def as_broad_phase(self, collides: Any) -> Callable[..., bool]:
        """``World.collides``, which passes whenever only the positions would decide."""

        def passed(*entities: Any) -> bool:
            if sys._getframe(1).f_globals is not collides.__func__.__globals__:  # not VMAS's physics, but a scenario
                return collides(*entities)
            self._is_broad_phase = True
            try:
                return collides(*entities)
            finally:
                self._is_broad_phase = False

        return passed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._n_calls += 1
        if self._n_calls > _MOST_CALLS:
            raise Untraceable(f"it has more than {_MOST_CALLS} calls of PyTorch")
        # PyTorch's own code reads tensors for itself, also the tracer
        if func in _READS and not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return self._read(func, *args)
        if not self._replays:
            return func(*args, **(kwargs or {}))
        mask = args[1] if func in (Tensor.__getitem__, Tensor.__setitem__) else None
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            if func is Tensor.__getitem__:
                return self._tag(args[0].clone(), mask)
            return self._write(*args)
        masked = [each for each in (*args, *(kwargs or {}).values()) if id(each) in self._masked]
        if masked:
            return self._call_by_row(func, masked, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _read(self, func: Callable[..., Any], tensor: Tensor) -> Any:
        if not self._replays:
            self.values.append(True if self._is_broad_phase else func(tensor))
            return self.values[-1]
        if self._n_replayed == len(self.values):
            raise Untraceable("it branches on random numbers")
        value = self.values[self._n_replayed]
        self._n_replayed += 1
        if not self._is_broad_phase:
            self.guards.append((tensor.clone().reshape(()), value))
        return value

    def _tag(self, tensor: Tensor, mask: Tensor) -> Tensor:
        self._masked[id(tensor)] = (tensor, mask)
        return tensor

    def _write(self, tensor: Tensor, mask: Tensor, value: Any) -> None:
        """``tensor[mask] = value``."""
        if id(value) in self._masked:
            self._check_same(mask, self._masked[id(value)][1])
        elif isinstance(value, Tensor) and value.ndim > tensor.ndim - mask.ndim and value.shape != (1,):
            raise Untraceable(f"x[mask] = a tensor of shape {tuple(value.shape)}")
        rows = mask.reshape(*mask.shape, *[1] * (tensor.ndim - mask.ndim))
        value = torch.as_tensor(value, device=tensor.device).to(tensor.dtype)
        tensor.copy_(torch.where(rows, value, tensor))

    def _call_by_row(
        self, func: Callable[..., Any], masked: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        name = func.__name__.strip("_")
        if name not in _BY_ROW and name[1:] not in _BY_ROW:  # __iadd__, add_, __radd__
            raise Untraceable(f"{func.__name__} of x[mask]")
        mask = self._masked[id(masked[0])][1]
        for other in masked[1:]:
            self._check_same(mask, self._masked[id(other)][1])
        for each in args:
            if isinstance(each, Tensor) and id(each) not in self._masked and each.ndim >= masked[0].ndim:
                raise Untraceable(f"{func.__name__} of x[mask] and a tensor of shape {tuple(each.shape)}")
        return self._tag(func(*args, **kwargs), mask)

    def _check_same(self, mask: Tensor, other: Tensor) -> None:
        """Two masks in one statement must be equal, whenever it runs."""
        if mask is not other:
            if mask.shape != other.shape:
                raise Untraceable("x[mask] with two masks")
            self.guards.append(((mask == other).all(), True))
