"""A function of a VMAS simulator as a graph of the tensors that its objects hold."""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.utils._pytree import TreeSpec, tree_flatten

from torchrl_trpo.envs.attribute_reads import attribute_reads
from torchrl_trpo.envs.branches import branching_by, replaced
from torchrl_trpo.envs.object_graph import kind_of, parts_of, path_of, walk
from torchrl_trpo.envs.reads import Reads, Untraceable
from torchrl_trpo.envs.snapshot import ObjectSnapshot, n_writes
from torchrl_trpo.kernels.buffers import NotCompiled, reason_of
from torchrl_trpo.kernels.record import record
from torchrl_trpo.seeding import forked_generators


class Places:
    """Where a simulator holds tensors, and what else it holds.

    Args:
        simulator: the simulator.
        numbers: the paths of attributes with a Python float that is taken for a tensor ``[]``.

    Attributes:
        paths: the names of the places.
        holders: for each place the dict or list that holds the tensor, and its key; None if it cannot be replaced.
        tensors: the tensors.
        containers: the dicts, lists and attributes of objects.
        fixed: the sets, and the functions with a closure or defaults.
        arrays: the NumPy arrays.
        objects: the objects with attributes, by their paths.
        others: everything else by its path: values without parts, the types of objects and containers, and the first
            path to what has several.
    """

    def __init__(self, simulator: Any, numbers: Set[str] = frozenset()) -> None:
        self._numbers, self._device = numbers, simulator.device
        self.paths = ["steps"]
        self.holders: list[tuple[Any, Any] | None] = [(vars(simulator), "steps")]
        self.tensors: list[Tensor] = [simulator.steps]
        self.containers: list[Any] = []
        self.fixed: list[Any] = []
        self.arrays: list[np.ndarray] = []
        self.objects: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        names: dict[int, str] = {}  # where what has parts is first met
        self._held_twice: set[str] = set()  # these places of what is met again
        for value, place, first in walk([("scenario", simulator.scenario), ("world", simulator.world)]):
            kind, path = kind_of(type(value)), path_of(place)
            if kind == "tensor" or (path in numbers and path in self.paths):
                continue
            name = path if kind == "leaf" else names.setdefault(id(value), path)
            if name != path:
                self._held_twice.add(name)
            is_shared = kind in {"object", "dict", "list", "set"} and name != path
            self.others[path] = name if is_shared else _described(value, kind)
            if first and kind == "array":
                self.arrays.append(value)
            if first and kind not in {"leaf", "array"}:
                self._add(value, kind, path)

    def _add(self, value: Any, kind: str, path: str) -> None:
        holder = vars(value) if kind == "object" else value if kind in {"dict", "list"} else None
        if holder is not None:
            self.containers.append(holder)
        if kind == "object":
            self.objects[path] = value
        parts = parts_of(value) if holder is None else holder
        if kind == "set" or (isinstance(value, FunctionType) and len(parts) > 1):
            self.fixed.append(value)
        items = parts.items() if isinstance(parts, dict) else enumerate(parts)
        for position, (key, part) in enumerate(items):
            place = f"{path}.{key if isinstance(key, str) else position}"
            is_number = holder is not None and type(part) is float and place in self._numbers
            if is_number or isinstance(part, Tensor):
                self.paths.append(place)
                self.holders.append(None if holder is None else (holder, key))
                self.tensors.append(torch.tensor(part, device=self._device) if is_number else part)

    def same(self) -> list[int]:
        """For each place the first one that holds the same tensor."""
        return first_with(map(id, self.tensors))

    def difference_in_sharing(self, here: Sequence[int], there: Sequence[int], places: Set[int]) -> str | None:
        """Which of some places share tensors with others at one time than at another, as of :meth:`same`."""
        for number, (one, other) in enumerate(zip(here, there, strict=True)):
            if one != other and not {number, one, other}.isdisjoint(places):
                path, first = self.paths[number], self.paths[min(one, other)]
                return f"{path} is the same tensor as {first} at one time, and another at one"
        return None

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Replaces the tensors."""
        for holder, tensor in zip(self.holders, tensors, strict=True):
            if holder is not None:
                holder[0][holder[1]] = tensor

    def difference(
        self, other: Places, sizes: tuple[int, int] | None = None, read: Set[str] | None = None
    ) -> str | None:
        """What of another simulator, or of this one at another time, is not as here, besides the tensors.

        ``sizes`` are the numbers of environments here and there, which may differ wherever they stand. Attributes that
        are not ``read`` may differ too.
        """
        if self.paths != other.paths:
            return f"{next(iter(set(self.paths) ^ set(other.paths)), 'the order of places')} is not there every time"
        for path in {**self.others, **other.others}:
            here, there = self.others.get(path, "nothing"), other.others.get(path, "nothing")
            if here is not there and not _is_like(here, there, sizes) and (read is None or self._is_in(path, read)):
                return f"{path} changes from {here!r} to {there!r}"
        return None

    def changed_numbers(self, other: Places) -> set[str]:
        """The paths of Python floats that are others at another time."""
        pairs = {path: (here, other.others.get(path)) for path, here in self.others.items()}
        return {path for path, (here, there) in pairs.items() if type(here) is type(there) is float and here != there}

    def _is_in(self, path: str, attributes: Set[str]) -> bool:
        """Whether what is at a path is in one of some attributes, or may be reached by another way."""
        while path and path not in self._held_twice:
            holder = path.rpartition(".")[0]
            if holder in self.objects:
                return path in attributes
            path = holder
        return True


def first_with(keys: Iterable[Hashable]) -> list[int]:
    """For each place the first one with the same key."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(key, number) for number, key in enumerate(keys)]


def _is_like(here: Any, there: Any, sizes: tuple[int, int] | None) -> bool:
    """Whether two values are equal, but for the numbers of environments. A NaN is like a NaN."""
    if isinstance(here, torch.Size) and isinstance(there, torch.Size) and len(here) == len(there):
        return all(_is_like(*each, sizes) for each in zip(here, there, strict=True))
    return bool(here == there or (here, there) == sizes or here != here)


def _described(value: Any, kind: str) -> Any:
    """What equals that of another simulator. Types are named: each simulator loads its scenario's module anew."""
    if kind == "array":
        return value.tobytes()
    cls = value if isinstance(value, type) else type(value)
    return value if kind == "leaf" and cls is not value else f"{cls.__module__}.{cls.__qualname__}"


@contextlib.contextmanager
def left_as_it_is(simulator: Any) -> Iterator[None]:
    """Restores what a simulator's objects hold, whatever happens to it inside the context."""
    snapshot = ObjectSnapshot((simulator.scenario, simulator.world), simulator.num_envs)
    if snapshot.hidden:
        raise NotCompiled(snapshot.hidden)
    steps, n_steps = simulator.steps, simulator.steps.clone()
    try:
        yield
    finally:
        snapshot.restore()
        simulator.steps = steps.copy_(n_steps)


class Trace(NamedTuple):
    """A function as a graph. Its inputs are the tensors at the places, then the arguments.

    Attributes:
        graph: the graph, without mutations. Its outputs are the tensors at the places afterwards, then the results,
            then the values that the function branched on.
        before: the places, with the tensors that it was traced with.
        results: the structure of the results, and their number.
        expected: what the values that the function branched on must be for the graph to stand for it.
        written: the places whose tensors the function writes to. Which others share these matters.
        read: the paths of the attributes that the function reads.
        origins: for each place where its tensor comes from: the number of a place before; of new tensors a negative
            number, which others with the same tensor have too.
    """

    graph: fx.GraphModule
    before: Places
    results: TreeSpec
    expected: list[Any]
    written: set[int]
    read: set[str]
    origins: list[int]

    @property
    def used(self) -> set[int]:
        """The places whose tensors are written to, or of which something is computed."""
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"][: len(self.before.paths)]
        are_read = (any(user.op != "output" for user in node.users) for node in inputs)
        return self.written.union(itertools.compress(itertools.count(), are_read))


def trace(
    simulator: Any, function: Callable[..., Any], arguments: Sequence[Tensor], numbers: Set[str] = frozenset()
) -> Trace:
    """Traces a function of a simulator.

    Python decides by the values of tensors at some places: in assertions and in ``if``. The graph has the decisions of
    this call, and gives the values that they were made by. The broad phase of VMAS's collisions is taken as passed, and
    decides over all environments whether there is a force. Where an ``if`` of the scenario only changes tensors of
    its objects, the graph has both ways, and takes one by the value.

    Args:
        simulator: the simulator; it is left as it was.
        function: the function, of ``arguments``. Its results are tensors in dicts, lists and tuples.
        arguments: tensors.
        numbers: the paths of attributes with a Python float that is an input of the graph.

    Returns:
        The graph.

    Raises:
        Untraceable: if the function changes anything besides tensors, reads tensors in another way, or draws random
            numbers that are not PyTorch's.
    """
    with warnings.catch_warnings():
        if numbers:
            warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # a body may fail where it is not due
            return _trace(simulator, function, arguments, numbers, merges=True)
        try:
            return _trace(simulator, function, arguments, numbers, merges=False)
        except Untraceable:
            raise
        except Exception as error:  # not all that takes a number, or a tensor, takes the tracer's
            raise Untraceable(reason_of(error)) from error


def _trace(
    simulator: Any, function: Callable[..., Any], arguments: Sequence[Tensor], numbers: Set[str], *, merges: bool
) -> Trace:
    """A trace, in which some ``if`` go both ways if ``merges``."""
    from vmas.simulator.core import World  # here, since VMAS is optional
    from vmas.simulator.scenario import BaseScenario
    from vmas.simulator.utils import ScenarioUtils

    before = Places(simulator, numbers)
    same = before.same()
    generators = numpys_and_pythons_generator()
    found: dict[str, Any] = {}
    read: set[str] = set()

    def run(tensors: Sequence[Tensor], arguments: Sequence[Tensor], reads: Reads) -> list[Tensor]:
        writes = [n_writes(tensor) for tensor in tensors]
        before.put(tensors)
        scenario, world = type(simulator.scenario), type(simulator.world)
        methods = branching_by(reads.branch, scenario, BaseScenario) if merges else {}
        broad_phase: dict[str, Any] = {"update_env_forces": reads.as_update_of_forces(world.update_env_forces)}
        if world.collides is World.collides:  # another one may decide by more than positions
            broad_phase["collides"] = reads.as_broad_phase(world.collides)
        tries = {"find_random_pos_for_entity": staticmethod(reads.as_tries(ScenarioUtils.find_random_pos_for_entity))}
        with reads, replaced(scenario, methods), replaced(world, broad_phase), replaced(ScenarioUtils, tries):
            with attribute_reads(before.objects, read):
                results = function(*arguments)
            after = Places(simulator)
            if difference := before.difference(after):
                raise Untraceable(difference)
            numbers = {id(tensor): number for number, tensor in reversed([*enumerate(tensors)])}
            found["written"] = {number for number, tensor in enumerate(tensors) if n_writes(tensor) != writes[number]}
            found["origins"] = [numbers.setdefault(id(tensor), -1 - k) for k, tensor in enumerate(after.tensors)]
            flat, found["results"] = tree_flatten(results)
            found["expected"] = [expected for _, expected in reads.guards]
            return [*after.tensors, *flat, *(value for value, _ in reads.guards)]

    def copies() -> tuple[list[Tensor], list[Tensor]]:
        return [tensor.clone() for tensor in before.tensors], [tensor.clone() for tensor in arguments]

    def replay(tensors: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
        joined = [first if first in written else number for number, first in enumerate(same)]
        return run([tensors[number] for number in joined], arguments, Reads(look, reads))

    def look() -> Places:
        return Places(simulator)

    reads = Reads(look)
    with left_as_it_is(simulator), forked_generators(simulator.device):
        tensors, copied = copies()
        run([tensors[number] for number in same], copied, reads)
    groups = {same[number] for number in found["written"].union(*reads.written)}
    written = {number for number, first in enumerate(same) if first in groups}
    if numpys_and_pythons_generator() != generators:
        raise Untraceable("it draws random numbers from NumPy or Python")
    with left_as_it_is(simulator), forked_generators(simulator.device):
        graph = record(functionalize(replay, remove="mutations"), *copies())
    _drop_writes_to_inputs(graph, before)
    return Trace(graph, before, found["results"], found["expected"], written, read, found["origins"])


def numpys_and_pythons_generator() -> tuple[Any, ...]:
    """The states of the random number generators that are not PyTorch's."""
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
