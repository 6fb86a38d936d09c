"""The tensors that a VMAS simulator's objects hold, as lanes in a few buffers, for compiled functions."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Set
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_trpo.envs.object_graph import parts_of
from torchrl_trpo.envs.tracing import Places
from torchrl_trpo.kernels.buffers import Buffers, NotCompiled, Slot
from torchrl_trpo.kernels.lanes import DTYPES, KINDS


class FlatState:
    """The tensors that a simulator's objects hold: those with a row for each environment are in buffers.

    The objects hold views of the buffers, so that both are always the same. What else the compiled functions read in
    the objects must stay as it is, since they have it in their code.

    Args:
        simulator: the simulator.
        twin: the same simulator with another number of environments, which tells tensors with a row for each from
            others.
        numbers: the paths of attributes with a Python float that compiled functions take for a tensor: it may change.

    Attributes:
        simulator: the simulator.
        numbers: as above.
        layout: where the tensors are in the buffers.
        reference: the places of the tensors, as they were at first.
        same: for each place the first one with the same tensor now. Each has a slot of its own nevertheless, since
            that may change in a step.
        written: the places that compiled functions write to; they share their tensors as they did at first.
        used: the places whose tensors compiled functions compute with, or write to.
        changed: the places that hold other tensors after a compiled function, or other rows.
        read: the paths of the attributes that compiled functions read; others may change.
        read_by_resets: those that a reset reads.
        slots: for each place its slot; None for a tensor that all environments share.
        buffers: the buffers.
        addresses: of the buffers, by kind, and then for each place of the tensor that all environments share.
        tensors: what the objects hold at each place, as of the last :meth:`attach` or :meth:`hold`.
        problem: what has changed, so that the compiled functions do not stand for the simulator's.
        reset_problem: what has changed, so that a reset is another one than at first.

    Raises:
        NotCompiled: if the two simulators differ in more than the number of environments.
    """

    def __init__(self, simulator: Any, twin: Any, numbers: Set[str] = frozenset()) -> None:
        self.simulator, self.numbers = simulator, numbers
        self.layout = Buffers(simulator.num_envs, simulator.device)
        self.reference = Places(simulator, numbers)
        self.same = self.reference.same()
        self.written: set[int] = set()
        self.used: set[int] = set()
        self.changed: set[int] = set()
        self.read: set[str] = set()
        self.read_by_resets: set[str] = set()
        self._same_at_first = self.same
        self.slots: list[Slot | None] = []
        self.addresses = np.zeros(len(DTYPES) + len(self.reference.paths), np.uint64)
        self.problem: str | None = None
        self.reset_problem: str | None = None
        self.tensors = list(self.reference.tensors)
        self._holders: list[tuple[Any, Any] | None] = []
        self._reset: set[int] = set()  # the places that hold other tensors after a reset, or other rows
        self._reset_in_place: set[int] = set()  # of these the ones whose tensors a reset writes to
        self._resets_are_known = False
        self._originals: dict[int, tuple[Tensor, int]] = {}  # by place: what was copied, and its version then
        self._copies: list[tuple[Tensor, Tensor]] = []  # the slots of tensors that are in another slot too, and these
        places = Places(twin, numbers)
        self._of_twin, self._sizes = places, (twin.num_envs, simulator.num_envs)
        self.add_reads(set())
        if difference := places.difference_in_sharing(places.same(), self.same, set(range(len(self.same)))):
            raise NotCompiled(f"with another number of environments, {difference}")
        for number, (path, tensor) in enumerate(zip(places.paths, places.tensors, strict=True)):
            ours = self.reference.tensors[number]
            if ours.device.type != self.layout.device.type:
                raise NotCompiled(f"{path} is on {ours.device}")
            if tensor.shape[:1] == (twin.num_envs,) and ours.shape == (simulator.num_envs, *tensor.shape[1:]):
                if tensor.dtype not in DTYPES.values():
                    raise NotCompiled(f"{path} is of {tensor.dtype}")
                self.slots.append(self.layout.add(KINDS[tensor.dtype], tensor.shape[1:]))
            elif tensor.shape == ours.shape:
                self.slots.append(None)
            else:
                raise NotCompiled(
                    f"{path} is {tuple(ours.shape)}, and for {twin.num_envs} environments {tuple(tensor.shape)}"
                )

    def add_reads(self, read: Set[str]) -> None:
        """Adds to the attributes that are read; NotCompiled is raised if one is another in the twin."""
        self.read |= read
        if difference := self._of_twin.difference(self.reference, self._sizes, self.read):
            raise NotCompiled(f"with another number of environments, {difference}")

    def attach(self) -> bool:
        """Takes over the tensors that the objects hold, if they are others than :meth:`hold` left there.

        Someone may still hold a tensor that was there before. If it has been written to, it is taken over again.

        Returns:
            Whether everything else is as it was.
        """
        is_kept = not self._originals or not self._put_back()
        if is_kept and self.problem is None and self._is_attached():
            for copy, tensor in self._copies:
                copy.copy_(tensor)  # someone may have written to it
            return True
        places = Places(self.simulator, self.numbers)
        difference = self.reference.difference(places, read=self.read) or self._other_kind(places)
        same = places.same()
        difference = difference or places.difference_in_sharing(same, self._same_at_first, self.written)
        self.problem = difference or self._shared_memory(places)
        if self.problem is not None:
            return False
        self.reset_problem = self.reference.difference(places, read=self.read_by_resets)
        self.same = same
        pairs = zip(places.paths, places.holders, strict=True)
        self._holders = [None if path in self.numbers else holder for path, holder in pairs]  # objects keep numbers
        self._originals = {
            number: original
            for number, tensor in enumerate(places.tensors)
            if (original := self._original(number, tensor)) is not None
        }
        self.tensors = list(places.tensors)
        self._watched = [_watch(holder) for holder in places.containers]
        self._sets = [(value, value.copy()) for value in places.fixed if isinstance(value, set)]
        self._functions = [(value, parts_of(value)) for value in places.fixed if not isinstance(value, set)]
        self._arrays = [(array, array.tobytes()) for array in places.arrays]
        buffers = self.layout.empty()
        for buffer in buffers.values():
            buffer[:, self.layout.n :] = 0
        for number, (slot, tensor) in enumerate(zip(self.slots, places.tensors, strict=True)):
            if slot is not None:
                self.layout.view(buffers, slot).copy_(tensor)
                continue
            holder, tensor = self._holders[number], tensor.contiguous()
            if holder is not None:
                holder[0][holder[1]] = tensor
            self.tensors[number] = tensor
            self.addresses[len(DTYPES) + number] = tensor.data_ptr()
        self.hold(buffers)
        return True

    def hold(self, buffers: dict[str, Tensor]) -> None:
        """Makes the objects hold the tensors in other buffers.

        Args:
            buffers: the buffers.
        """
        self.move(buffers)
        self._copies = []
        views: dict[int, Tensor] = {}
        for number, (slot, holder, first) in enumerate(zip(self.slots, self._holders, self.same, strict=True)):
            if slot is not None and holder is not None:
                if first not in views:
                    views[first] = self.layout.view(buffers, slot)
                elif number != first:
                    self._copies.append((self.layout.view(buffers, slot), views[first]))
                self.tensors[number] = holder[0][holder[1]] = views[first]

    def share(self, same: list[int]) -> None:
        """Takes note of which places hold the same tensors from now on, as of :attr:`same`."""
        if same is not self.same:
            self.same = same
            self.problem = self.reference.difference_in_sharing(same, self._same_at_first, self.written)

    def note_reset(self, number: int, in_place: bool) -> None:
        """Takes note that resets put other tensors at a place, or write to those that are there."""
        self._reset.add(number)
        if in_place:
            self._reset_in_place.add(number)
        self._originals.pop(number, None)

    def check_memory(self, resets_are_noted: bool) -> None:
        """Raises NotCompiled if tensors share memory that may be written to. If resets are not noted, they may."""
        self._resets_are_known = True
        if not resets_are_noted:
            self._reset_in_place.update(range(len(self.slots)))
        if problem := self._shared_memory(Places(self.simulator, self.numbers)):
            raise NotCompiled(problem)

    def move(self, buffers: dict[str, Tensor]) -> None:
        """Takes other buffers, of which the objects learn nothing until :meth:`hold`."""
        self.buffers = buffers
        self.addresses[: len(DTYPES)] = [buffer.data_ptr() for buffer in buffers.values()]

    def _other_kind(self, places: Places) -> str | None:
        """Which tensor has another type or shape than at first, or is elsewhere."""
        for path, *tensors in zip(places.paths, self.reference.tensors, places.tensors, strict=True):
            before, after = ((tensor.dtype, tuple(tensor.shape), tensor.device) for tensor in tensors)
            if before != after:
                return f"{path} changes from {before} to {after}"
        return None

    def _original(self, number: int, tensor: Tensor) -> tuple[Tensor, int] | None:
        """The tensor that is copied from a place, and its version; None if nobody else can have it, or none is."""
        if number in self._originals and tensor is self.tensors[number]:
            return self._originals[number]
        is_copied = self.slots[number] is not None or not tensor.is_contiguous()
        is_changed = number in self.changed or number in self._reset
        return (tensor, tensor._version) if is_copied and not is_changed and not tensor.is_inference() else None

    def _put_back(self) -> bool:
        """Makes the objects hold the tensors again that were copied and have been written to since; if there are."""
        written = [number for number, (tensor, version) in self._originals.items() if tensor._version != version]
        if not written:
            return False
        originals = {id(self.tensors[number]): self._originals.pop(number)[0] for number in written}
        for holder, tensor in zip(self._holders, self.tensors, strict=True):
            with contextlib.suppress(LookupError):
                if holder is not None and holder[0][holder[1]] is tensor and id(tensor) in originals:
                    holder[0][holder[1]] = originals[id(tensor)]
        return True

    def _shared_memory(self, places: Places) -> str | None:
        """Which tensor has memory in common with another one, both of which matter.

        They do not if each step replaces one before it reads it, or if nobody writes to them.
        """
        if not self._resets_are_known:
            return None
        matter = [n for n in range(len(places.tensors)) if n in self.used or n not in self.changed]
        written = self.written | self._reset_in_place
        tensors = {id(places.tensors[number]): number for number in reversed(matter)}
        parts = sorted((*_extent(places.tensors[number]), number) for number in tensors.values())
        for position, (_, end, number) in enumerate(parts):
            for start, _, other in itertools.islice(parts, position + 1, None):
                if start >= end:
                    break
                pair = {number, other}
                are_shared_by_all = self.slots[number] is self.slots[other] is None
                if are_shared_by_all or not pair & written:
                    continue
                if _overlap(places.tensors[number], places.tensors[other]):
                    return f"{places.paths[number]} shares its memory with {places.paths[other]}"
        return None

    def _is_attached(self) -> bool:
        """Whether the objects hold what was left there."""
        if not self._holders:
            return False
        try:
            for holder, tensor in zip(self._holders, self.tensors, strict=True):
                if holder is not None and holder[0][holder[1]] is not tensor:
                    return False
            if any(array.tobytes() != held for array, held in self._arrays):
                return False
            for value, parts in self._functions:
                now = parts_of(value)
                if len(now) != len(parts) or not all(map(operator.is_, now, parts)):
                    return False
            if any(value != held for value, held in self._sets):
                return False
            return all(len(holder) == size and values(holder) == held for holder, values, held, size in self._watched)
        except (LookupError, TypeError, ValueError):  # an entry is gone, or is no longer what can be compared
            return False


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor begins and ends."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    n_spanned = 1 + sum((size - 1) * stride for size, stride in pairs) if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + n_spanned * tensor.element_size()


def _overlap(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have an element in common; those of other sizes are taken to have one."""
    return tensor.element_size() != other.element_size() or bool(torch.isin(_places(tensor), _places(other)).any())


def _places(tensor: Tensor) -> Tensor:
    """Where the elements of a tensor are in memory."""
    found = torch.tensor([tensor.data_ptr()])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = (found.unsqueeze(-1) + torch.arange(size) * stride * tensor.element_size()).flatten()
    return found


def _watch(holder: Any) -> tuple[Any, Any, Any, int]:
    """A container, what reads its entries that are no tensors, what that gives now, and its size."""
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    keys = [key for key, value in items if not isinstance(value, Tensor)]
    values = itemgetter(*keys) if keys else len
    return holder, values, values(holder), len(holder)
