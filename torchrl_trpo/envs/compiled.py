"""A function of a VMAS simulator, compiled: one loop over the environments, on the tensors that the objects hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from torchrl_trpo.envs.flat_state import FlatState
from torchrl_trpo.envs.reads import Untraceable
from torchrl_trpo.envs.tracing import Places, first_with, left_as_it_is, trace
from torchrl_trpo.kernels.aten import Operations
from torchrl_trpo.kernels.buffers import Buffers, Columns, Draws, NotCompiled, Slot, reason_of
from torchrl_trpo.kernels.compiler import Call
from torchrl_trpo.kernels.lanes import DTYPES, Lanes, Lowered, Unsupported
from torchrl_trpo.kernels.rows import RowsOnCpu, compile_rows
from torchrl_trpo.kernels.writer import Guard, Store
from torchrl_trpo.seeding import device_state, forked_generators, set_device_state

_MOST_CHANGES = 16  # of last bits, to see what a simulator decides by them


class _Part:
    """Values of a function that are needed beforehand, because all environments together decide by them."""

    def __init__(
        self, layout: Buffers, lowered: Lowered, values: Sequence[Lanes], inputs: Mapping[str, tuple[int, int]]
    ) -> None:
        own = Buffers(layout.n, layout.device)
        slots, stores = [], []
        for lanes in values:
            of_rows = lanes.of_rows()
            if of_rows is None:
                raise NotCompiled("x[mask] is of other rows than the environments")
            slots.append(own.add(lanes.kind, of_rows.shape[1:]))
            for lane, value in zip(slots[-1].lanes, of_rows.flat, strict=True):
                value = lowered.statements.convert(value, lanes.kind)
                stores.append(Store(value, lanes.kind, slots[-1].buffer, lane))
        self._layout, self._columns = own, Columns(own, slots)
        self._outputs = np.array([buffer.data_ptr() for buffer in self._columns.buffers.values()], np.uint64)
        try:
            self._run = compile_rows(layout.device, lowered.statements.all, inputs, stores, []) if values else None
        except KeyError as error:
            raise NotCompiled(f"rows are chosen by random numbers, or by other rows: {error}") from error

    def __call__(self, inputs: np.ndarray) -> list[Tensor] | None:
        if self._run is not None and not self._run(self._layout.n, self._layout.padded, inputs, self._outputs):
            return None
        return self._columns.tensors


class CompiledFunction:
    """A function of a simulator and some tensors, compiled.

    It is traced on a twin, which is the same simulator with another number of environments. A call reads the tensors
    that the simulator's objects hold, and makes them hold new ones. If a value on which the function branched is
    another than in the trace, or if something else that it reads has changed in the objects, a call does nothing and
    says so.

    Args:
        state: the simulator's tensors.
        twin: the twin.
        function: of a simulator and the arguments.
        arguments: for the twin, tensors with its number of environments first.

    Attributes:
        draws: the random tensors that a call draws from the device's global generator.
        changes_state: whether it changes what the simulator's objects hold.
        results: the layout of buffers for the results.
        slots: where they are in such buffers.
        structure: the structure of what the function returns.

    Raises:
        NotCompiled: if the function cannot be compiled, with the reason.
    """

    def __init__(
        self, state: FlatState, twin: Any, function: Callable[..., Any], arguments: Sequence[Tensor] = ()
    ) -> None:
        self._state = state
        self.results = Buffers(state.layout.n, state.layout.device)
        try:
            traced = trace(twin, lambda *arguments: function(twin, *arguments), arguments, state.numbers)
            before, self._origins = traced.before, traced.origins
            self._joined = [first if first in traced.written else k for k, first in enumerate(before.same())]
            state.written |= traced.written
            state.used |= traced.used
            state.add_reads(traced.read)
            inputs = [
                (path, tensor, None if slot is None else 0)
                for path, tensor, slot in zip(before.paths, before.tensors, state.slots, strict=True)
            ]
            inputs += [(f"argument{number}", tensor, 0) for number, tensor in enumerate(arguments)]
            lowered = Operations(traced.graph, twin.num_envs).lower(inputs)
            n_places, n_guards = len(before.paths), len(traced.expected)
            n_results = len(lowered.outputs) - n_places - n_guards
            stores = self._stores(lowered, n_places, n_results)
            branches = zip(lowered.outputs[n_places + n_results :], traced.expected, strict=True)
            guards = [Guard.of(lowered.statements, lanes, expected) for lanes, expected in branches]
            names = [name for name, *_ in inputs[n_places:]]
            names += [f"draw{number}" for number in range(len(lowered.draws))]
            names += [f"first{number}" for number in range(len(lowered.firsts))]
            buffers = {
                path: (len(DTYPES) + number, 0) if slot is None else (slot.buffer, slot.lane)
                for number, (path, slot) in enumerate(zip(before.paths, state.slots, strict=True))
            }
            buffers |= {name: (len(DTYPES) + n_places + number, 0) for number, name in enumerate(names)}
            self._run = compile_rows(state.layout.device, lowered.statements.all, buffers, stores, guards)
            buffers = {name: place for name, place in buffers.items() if name[:5] != "first"}
            self._of_firsts = _Part(state.layout, lowered, [each for pair in lowered.firsts for each in pair], buffers)
            buffers = {name: place for name, place in buffers.items() if name[:4] != "draw"}
            self._of_masks = _Part(state.layout, lowered, [*lowered.masks.values()], buffers)
        except Unsupported as error:
            raise NotCompiled(f"it cannot be computed for one environment (a row) alone: {error}") from error
        except Untraceable as error:
            raise NotCompiled(str(error)) from error
        except (TypeError, ValueError, LookupError, NotImplementedError) as error:
            raise NotCompiled(f"an operation is called in a way that is not known: {reason_of(error)}") from error
        self._sharing: tuple[Any, bool, list[int]] = (None, False, [])  # before a call, its rows, and afterwards
        self.structure = traced.results
        self.draws = lowered.draws
        self._arguments = Columns.like(state.layout.n, arguments)
        self._drawn = Draws(state.layout, self.draws)
        self._inputs = np.zeros(len(state.addresses) + len(names), np.uint64)
        self._masked = list(lowered.masks)
        firsts = [torch.empty(lanes.shape[1:], dtype=DTYPES[lanes.kind]) for lanes, _ in lowered.firsts]
        self._firsts = [tensor.to(state.layout.device) for tensor in firsts]
        addresses = [*self._drawn.addresses, *(tensor.data_ptr() for tensor in self._firsts)]
        self._inputs[len(state.addresses) + len(arguments) :] = addresses
        self._outputs = np.zeros(2 * len(DTYPES), np.uint64)

    def _stores(self, lowered: Lowered, n_places: int, n_results: int) -> list[Store]:
        """What the function writes: the state, and its results."""
        state, stores = self._state, []

        def store(path: str, lanes: Lanes, slot: Slot | None, first_buffer: int) -> Slot:
            values = lanes.of_rows()
            if values is None:
                raise NotCompiled(f"{path} has no row for each environment")
            slot = slot or self.results.add(lanes.kind, values.shape[1:])
            if slot.kind != lanes.kind or slot.shape != values.shape[1:]:
                raise NotCompiled(f"{path} changes its type or its shape")
            for lane, value in zip(slot.lanes, values.flat, strict=True):
                value = lowered.statements.convert(value, slot.kind)
                stores.append(Store(value, slot.kind, first_buffer + slot.buffer, lane))
            return slot

        self.changes_state = False
        for number, (path, slot) in enumerate(zip(state.reference.paths, state.slots, strict=True)):
            before, after = lowered.inputs[self._joined[number]], lowered.outputs[number]
            changes = not before.is_same(after)
            self.changes_state |= changes
            if changes:
                state.changed.add(number)
            if changes and (slot is None or state.reference.holders[number] is None):
                raise NotCompiled(f"{path} changes, and is shared by all environments or cannot be replaced")
            if slot is not None:
                store(path, after, slot, 0)
        if not self.changes_state:
            stores.clear()
        results = lowered.outputs[n_places : n_places + n_results]
        self.slots = [store("a result", lanes, None, len(DTYPES)) for lanes in results]
        self._used = None if lowered.used is None else self.results.add("i", ())
        if self._used is not None:
            stores.append(Store(lowered.used, "i", len(DTYPES) + self._used.buffer, self._used.lane))
        return stores

    def __call__(self, *arguments: Tensor, rows: Tensor | None = None) -> Any:
        """Calls the function.

        Args:
            *arguments: tensors with the number of environments first.
            rows: the environments whose tensors change, bool ``[n]``; those of others stay. Default: all.

        Returns:
            Its results; None, and no change, if the compiled one does not stand for the function now.
        """
        state = self._state
        if not state.attach():
            return None
        self._arguments.put(arguments)
        after = state.layout.empty() if self.changes_state else state.buffers
        results = self.results.empty()
        if not self.run(self._arguments.addresses, after, results, rows):
            return None
        if self.changes_state:
            state.hold(after)
        return tree_unflatten([self.results.view(results, slot) for slot in self.slots], self.structure)

    def run(
        self,
        arguments: Sequence[int] | np.ndarray,
        after: dict[str, Tensor],
        results: dict[str, Tensor],
        rows: Tensor | None = None,
    ) -> bool:
        """Calls the function on buffers alone: what VMAS's objects hold stays as it is.

        Args:
            arguments: where the lanes of the arguments are.
            after: buffers of the state's layout, to be written if the function changes the state.
            results: buffers of the results' layout, to be written.
            rows: as above.

        Returns:
            Whether the function stands for the simulator's now; otherwise the buffers hold nothing of use.
        """
        state, n, device = self._state, self._state.layout.n, self._state.layout.device
        generator = device_state(device) if self.draws else None
        self._read_from(arguments)
        of_masks = self._of_masks(self._inputs)
        if of_masks is None:
            return False
        masks = dict(zip(self._masked, of_masks, strict=True))
        self._drawn.draw(masks)
        of_firsts = self._of_firsts(self._inputs)
        if of_firsts is None:
            if generator is not None:
                set_device_state(device, generator)
            return False
        for first, tensor, mask in zip(self._firsts, of_firsts[::2], of_firsts[1::2], strict=True):
            first.copy_(tensor[mask.int().argmax()])
        self._outputs[:] = [buffer.data_ptr() for buffer in (*after.values(), *results.values())]
        if not self._run(n, state.layout.padded, self._inputs, self._outputs):
            if generator is not None:
                set_device_state(device, generator)
            return False
        if self.changes_state:
            state.share(self._sharing_after(rows is not None))
        if self._used is not None and generator is not None:
            set_device_state(device, generator)
            self._drawn.draw(masks, int(self.results.view(results, self._used)[0]))
        if rows is not None and self.changes_state:
            is_changed = torch.zeros(state.layout.padded, dtype=torch.bool, device=device)
            is_changed[:n] = rows
            for kind, buffer in after.items():
                torch.where(is_changed, buffer, state.buffers[kind], out=buffer)
        return True

    def call(self, arguments: Sequence[int] | np.ndarray, results: Columns, *, of_rows: bool = False) -> Call | None:
        """The function on addresses, for C++ to call. The first inputs and outputs are the buffers of the state.

        Args:
            arguments: as of :meth:`run`.
            results: where the results are written.

        Keyword Args:
            of_rows: whether the state of some environments stays.

        Returns:
            The call; None if more than the compiled code is needed, or other places hold the same tensors after it.
        """
        state, has_more = self._state, self.draws or self._masked or self._firsts or self._used is not None
        if has_more or not isinstance(self._run, RowsOnCpu):
            return None
        if self.changes_state and self._sharing_after(of_rows) is not state.same:
            return None
        self._read_from(arguments)
        self._outputs[len(DTYPES) :] = [buffer.data_ptr() for buffer in results.buffers.values()]
        return self._run.on(self._inputs, self._outputs)

    def _read_from(self, arguments: Sequence[int] | np.ndarray) -> None:
        """Makes the state as it is now, and arguments, the inputs."""
        n_state = len(self._state.addresses)
        self._inputs[:n_state] = self._state.addresses
        self._inputs[n_state : n_state + len(arguments)] = arguments

    def _sharing_after(self, keeps_rows: bool) -> list[int]:
        """Which places hold the same tensors after a call; if it keeps some rows, those that did before too."""
        same = self._state.same
        if self._sharing[0] is not same or self._sharing[1] != keeps_rows:
            after = [same[number] if number >= 0 else number for number in self._origins]
            self._sharing = same, keeps_rows, first_with(zip(same, after, strict=True) if keeps_rows else after)
            if self._sharing[2] == same:
                self._sharing = same, keeps_rows, same
        return self._sharing[2]

    def compare(self, draw: Callable[[], Sequence[Tensor]], function: Callable[..., Any], n_calls: int = 5) -> None:
        """Compares calls with those of the function itself, each from the same state with the same random numbers.

        A simulator may decide by the last bit of a number: in VMAS, which way a joint of two points at one place pulls.
        So the results of an environment may differ by as much as those of the function do when its tensors change in
        the last bit.

        Args:
            draw: draws arguments.
            function: the function.
            n_calls: how many calls.

        Raises:
            NotCompiled: if the results differ by more, or nearly all calls are not like the traced one.
        """
        simulator, n_other = self._state.simulator, 0

        def results_of(call: Callable[[], Any], seed: int | None = None) -> list[Tensor]:
            """What a call leaves and returns; nothing if it returns None. Afterwards all is as it was.

            With a seed, last bits are changed before.
            """
            with left_as_it_is(simulator), forked_generators(self._state.layout.device):
                if seed is not None:
                    places = Places(simulator, self._state.numbers)
                    generator = torch.Generator().manual_seed(seed)
                    for holder, tensor, slot in zip(places.holders, places.tensors, self._state.slots, strict=True):
                        if holder is not None and slot is not None:
                            holder[0][holder[1]] = _changed(tensor, generator)
                if (returned := call()) is None:
                    return []
                return [tensor.clone() for tensor in (*Places(simulator).tensors, *tree_leaves(returned))]

        for _ in range(n_calls):
            arguments = draw()
            ours = results_of(functools.partial(self, *arguments))
            if ours:
                call = functools.partial(function, simulator, *arguments)
                names = [*Places(simulator).paths, *(f"result {number}" for number in range(len(self.slots)))]
                exact, others = results_of(call), list[list[Tensor]]()
                find = functools.partial(find_difference, names, ours, exact, floor=1e-3)
                if find() and not all(map(_is_same, results_of(call), exact)):
                    raise NotCompiled("it gives other numbers when it is called again")
                while (difference := find(others)) and len(others) < _MOST_CHANGES:
                    others.append(results_of(call, len(others)))
                if difference:
                    raise NotCompiled(difference)
            else:
                n_other += 1
            function(simulator, *arguments)  # to another state
        if n_other > n_calls / 2:
            reason = self._state.problem or "they go another way through its if and while statements"
            raise NotCompiled(f"of {n_calls} calls, {n_other} are not like the traced one: {reason}")


def _changed(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor whose numbers are a bit larger, a bit smaller, or the same."""
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor)
    return tensor * (1.0 + 2.0**-23 * signs)


def check_equal(names: Sequence[str], tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Raises NotCompiled if tensors differ, see :func:`find_difference`."""
    if difference := find_difference(names, tensors, exact):
        raise NotCompiled(difference)


def find_difference(
    names: Sequence[str],
    tensors: Sequence[Tensor],
    exact: Sequence[Tensor],
    others: Sequence[Sequence[Tensor]] = (),
    *,
    floor: float = 1.0,
) -> str | None:
    """Compares tensors up to rounding, relative to the largest number in each.

    Args:
        names: their names.
        tensors: the tensors.
        exact: what they should be.
        others: what they may be as well: a row of a tensor may be as far from what it should be as four times these.

    Keyword Args:
        floor: the largest number is taken to be at least this, since small ones may be what is left of large ones.

    Returns:
        Which one differs; None if there is none.
    """
    for number, (name, tensor, right) in enumerate(zip(names, tensors, exact, strict=True)):
        is_equal = tensor.shape == right.shape and tensor.dtype == right.dtype
        if is_equal and right.numel():
            found, expected = _rows(tensor), _rows(right)
            bound = 1e-4 * max(floor, expected.abs().max().item()) * right.is_floating_point()
            spread = [(_rows(other[number]) - expected).abs().amax(1, True) for other in others]
            limit = 4 * torch.stack(spread).amax(0) + bound if spread else bound
            is_equal = bool(((found - expected).abs() <= limit).all()) and torch.equal(tensor.isnan(), right.isnan())
        if not is_equal:
            return f"{name} is not what it should be"
    return None


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(_rows(tensor), _rows(other))


def _rows(tensor: Tensor) -> Tensor:
    """A tensor in double precision, without NaN, as a row for each entry of its first dimension."""
    return tensor.double().nan_to_num().reshape(len(tensor) if tensor.ndim else 1, -1)
