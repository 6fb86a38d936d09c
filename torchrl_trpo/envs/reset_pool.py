"""Environments that have been reset together and wait until one that has ended takes their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchrl_trpo.envs.attribute_reads import TensorReads, attribute_reads
from torchrl_trpo.envs.compiled import check_equal
from torchrl_trpo.envs.flat_state import FlatState
from torchrl_trpo.envs.snapshot import n_writes
from torchrl_trpo.envs.tracing import Places, first_with
from torchrl_trpo.kernels.buffers import NotCompiled, Slot, reason_of
from torchrl_trpo.kernels.lanes import DTYPES

_RESETS_TO_TRY = 10  # until one draws something else for all environments


class ResetPool:
    """Environments that have been reset together, for those that end one after the other.

    A reset of hundreds of environments costs as much as one of a single environment. So a twin of the simulator resets
    many at once, and each environment that ends takes the next one: every one is used once. Of a tensor that resets do
    not write, an environment keeps its own rows.

    Args:
        state: the simulator's tensors.
        twin: the same simulator, with as many environments as are to be reset together.
        reset: resets all environments of the twin.

    Raises:
        NotCompiled: if what a reset leaves depends on what was there before, or is not a row for each environment.
    """

    def __init__(self, state: FlatState, twin: Any, reset: Callable[[], None]) -> None:
        self._state = state
        self._twin = twin
        self._n = twin.num_envs
        self._reset = reset
        self._lanes: dict[str, Tensor] = {}  # by kind, the lanes of the simulator's buffers that a reset writes
        self._fresh: dict[str, Tensor] = {}  # by kind, the rows of the environments in the pool, [..., lanes]
        self._origins: list[int] = []  # by place, which tensor a reset leaves there; 0 if it does nothing
        self._written: set[int] = set()  # the places with tensors that a reset writes to
        self._same: list[int] = []  # for each place the first one with the same tensor before a reset
        self._sharing: tuple[Any, list[int]] = (None, [])  # before a reset, and afterwards
        self._read: list[int] = []  # the places whose tensors a reset reads
        self._shared: list[Tensor] = []  # those that all environments share, as they were when the pool was filled
        self._constants: list[tuple[int, Slot, Tensor]] = []  # places that a reset reads and leaves, and their rows
        self._next = twin.num_envs  # of the environments in the pool; it is empty

    def check(self, rewind: Callable[[], None]) -> None:
        """Finds what a reset reads, and checks by two from different states that it depends on random numbers alone.

        Args:
            rewind: takes the random numbers back to what they are now, and the twin to another state.
        """
        before, reads = Places(self._twin), TensorReads()
        if difference := before.difference(self._state.reference, (self._n, self._state.layout.n)):
            raise NotCompiled(f"with another number of environments, {difference}")
        with attribute_reads(before.objects, self._state.read_by_resets), reads:
            self._reset()
        self._read = [number for number, tensor in enumerate(before.tensors) if id(tensor) in reads.found]
        rewind()
        left = []
        for _ in range(2):
            try:
                self._fill()
            except Exception as error:  # what it reads may be impossible the second time
                raise NotCompiled(reason_of(error)) from error
            left.append([*self._lanes.values(), *self._fresh.values()])
            rewind()
            self._change_what_it_overwrites()
        for number in self._read:
            slot, rows = self._state.slots[number], before.tensors[number]
            if slot is not None and self._origins[number] == 0:
                if not torch.equal(rows, rows[:1].expand_as(rows)):
                    raise NotCompiled(f"a reset reads {before.paths[number]}, which it does not write")
                self._constants.append((number, slot, rows[0].clone()))
        check_equal(["what a reset leaves"] * len(left[0]), left[0], left[1])
        for _ in range(_RESETS_TO_TRY):
            self._fill()
        self.clear()

    def _change_what_it_overwrites(self) -> None:
        """Changes the rows of the twin's tensors that a reset reads and writes: it may read them first."""
        places = Places(self._twin)
        overwritten = [number for number in self._read if self._origins[number] and self._state.slots[number]]
        changed = {id(places.tensors[number]): places.tensors[number] for number in overwritten}
        for key, tensor in changed.items():
            changed[key] = ~tensor if tensor.dtype == torch.bool else tensor + 1
        places.put([changed.get(id(tensor), tensor) for tensor in places.tensors])

    def state_dict(self) -> dict[str, Any]:
        """The environments in the pool."""
        sharing = {"origins": self._origins, "written": list(self._written), "same": self._same}
        return {"lanes": self._lanes, "rows": self._fresh, "next": self._next, "shared": self._shared, **sharing}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave; one of an older version, without rows, leaves the pool empty."""
        if "rows" not in state_dict:
            self.clear()
            return
        device = self._state.layout.device
        self._lanes, self._fresh = (
            {kind: tensor.to(device) for kind, tensor in state_dict[name].items()} for name in ("lanes", "rows")
        )
        self._next = state_dict["next"]
        self._shared = [tensor.to(device) for tensor in state_dict.get("shared", self._shared)]
        self._origins, self._written, self._same = state_dict["origins"], set(state_dict["written"]), state_dict["same"]
        self._sharing = None, []
        if any(len(rows) != self._n for rows in self._fresh.values()):  # of another version
            self.clear()

    def take(self, ended: Tensor) -> bool:
        """Puts fresh environments in the place of ended ones.

        Args:
            ended: which have ended, bool ``[num_envs]``.

        Returns:
            Whether it has; otherwise the ended environments are to be reset by VMAS, because the simulator's objects
            hold other things than when it was compiled, or the reset of all would change such things.
        """
        if not self._state.attach():
            return False
        same = self._state.same
        has = self.put(ended)
        if self._state.same is not same:
            self._state.hold(self._state.buffers)
        return has

    def put(self, ended: Tensor) -> bool:
        """Puts fresh environments in the place of ended ones, in the state's buffers; whether it has."""
        state = self._state
        if not self._are_resets_known():
            return False
        if self._has_other_shared():
            self.clear()
        rows = ended.nonzero()
        while len(rows):
            if self._next == self._n:
                try:
                    self._fill()
                except NotCompiled:  # it has drawn something else for all environments
                    return False
            if self._sharing[0] is not self._state.same and not self._find_sharing():
                return False
            n_now = min(len(rows), self._n - self._next)
            for kind, lanes in self._lanes.items():
                fresh = self._fresh[kind][self._next : self._next + n_now]
                state.buffers[kind].index_put_((lanes, rows[:n_now]), fresh)
            self._next += n_now
            rows = rows[n_now:]
            state.share(self._sharing[1])
        return True

    def _are_resets_known(self) -> bool:
        """Whether resets are what they were when the pool was checked."""
        state = self._state
        values = ((state.layout.view(state.buffers, slot), row) for _, slot, row in self._constants)
        return state.reset_problem is None and all(torch.equal(now, row.expand_as(now)) for now, row in values)

    def _has_other_shared(self) -> bool:
        """Whether what all environments share is something else than when the pool was filled."""
        return not all(torch.equal(*pair) for pair in zip(self._shared_now(), self._shared, strict=True))

    def waiting(self) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
        """The environments that wait, for others than :meth:`put` to put them in place in many steps.

        Returns:
            How many there are; by kind, the lanes of the state that a reset writes, and the numbers in them for each
            environment. None wait if steps may change what a reset reads, or a reset changes which places hold the same
            tensors.
        """
        same, n_waiting = self._state.same, self._n - self._next
        may_change = any(number in self._state.changed for number, *_ in self._constants)
        if may_change or not self._are_resets_known() or self._has_other_shared():
            return 0, {}
        if self._sharing[0] is not same or self._sharing[1] is not same:
            return 0, {}
        return n_waiting, {kind: (lanes, self._fresh[kind][self._next :]) for kind, lanes in self._lanes.items()}

    def taken(self, n: int) -> None:
        """Takes note that so many of those that wait are in place."""
        self._next += n

    def clear(self) -> None:
        """Forgets the environments in the pool: those that follow are reset anew."""
        self._next = self._n

    def _shared_now(self) -> list[Tensor]:
        """The tensors that all environments share and a reset reads."""
        return [self._state.tensors[number] for number in self._read if self._state.slots[number] is None]

    def _find_sharing(self) -> bool:
        """Finds which places hold the same tensors after a reset; whether it stands for those that do before."""
        same, reference = self._state.same, self._state.reference
        if same != self._same and reference.difference_in_sharing(same, self._same, self._written):
            return False
        after = first_with(zip(same, self._origins, strict=True))
        self._sharing = same, same if after == same else after
        return True

    def _fill(self) -> None:
        """Resets all environments of the twin."""
        before = Places(self._twin)
        # The tensors get memory of their own: writes to those that share it are counted together.
        own = {id(tensor): tensor.clone() for tensor in before.tensors}
        pairs = zip(before.tensors, before.holders, strict=True)
        tensors = [tensor if holder is None else own[id(tensor)] for tensor, holder in pairs]
        before.put(tensors)
        for mine, tensor, slot in zip(tensors, self._state.tensors, self._state.slots, strict=True):
            if slot is None:
                mine.copy_(tensor)
        self._shared = [tensor.clone() for tensor in self._shared_now()]
        held = [(tensor, n_writes(tensor), tensor.clone()) for tensor in tensors]
        self._reset()
        after = Places(self._twin)
        if difference := before.difference(after):
            raise NotCompiled(f"a reset does more than to write tensors: {difference}")
        self._origins, self._written, self._same = [0] * len(tensors), set(), before.same()
        self._sharing = None, []
        shared = after.same()
        lanes: dict[str, list[int]] = {kind: [] for kind in DTYPES}
        device = self._state.layout.device
        fresh: dict[str, list[Tensor]] = {kind: [] for kind in DTYPES}
        for number, ((old, writes, values), new) in enumerate(zip(held, after.tensors, strict=True)):
            slot = self._state.slots[number]
            if new is old and n_writes(new) == writes:
                continue
            self._origins[number] = 1 + shared[number]
            if new is old:
                self._written.add(number)
            if slot is None:
                check_equal([f"{before.paths[number]}, which all environments share,"], [values], [new])
                continue
            self._state.note_reset(number, in_place=new is old)
            if new.shape != (self._n, *slot.shape) or new.dtype != DTYPES[slot.kind]:
                raise NotCompiled(f"a reset changes the shape or type of {before.paths[number]}")
            lanes[slot.kind] += slot.lanes
            fresh[slot.kind].append(new.reshape(self._n, -1))
        self._lanes = {kind: torch.tensor(numbers, device=device) for kind, numbers in lanes.items() if numbers}
        self._fresh = {kind: torch.cat(fresh[kind], 1) for kind in self._lanes}
        self._next = 0
