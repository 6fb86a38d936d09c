"""Environments that have been reset together and wait until one that has ended takes their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchrl_trpo.envs.compiled import check_equal
from torchrl_trpo.envs.flat_state import FlatState, NotCompiled
from torchrl_trpo.envs.snapshot import n_writes
from torchrl_trpo.envs.tracing import Places, left_as_it_is

_RESETS_TO_TRY = 10  # until one draws something else for all environments


class ResetPool:
    """Environments that a simulator has reset, for those that end one after the other.

    A reset of all environments costs as much as one of a single environment. So all are reset at once, apart from the
    ones in use, and each that ends takes the next: every one is used once. Of a tensor that resets do not write, an
    environment keeps its own rows.

    Args:
        state: the simulator's tensors.
        reset: resets all environments of the simulator.

    Raises:
        NotCompiled: if what a reset leaves depends on what was there before, or is not a row for each environment.
    """

    def __init__(self, state: FlatState, reset: Callable[[], None]) -> None:
        self._state = state
        self._reset = reset
        self._lanes: dict[str, Tensor] = {}  # by kind, the lanes of the simulator's buffers that a reset writes
        self._fresh: dict[str, Tensor] = {}  # by kind, these lanes of the environments in the pool, [lanes, num_envs]
        self._next = state.layout.n  # of the environments in the pool; it is empty

    def check(self, rewind: Callable[[], None]) -> None:
        """Checks that a reset depends on random numbers alone, by two resets from different states.

        Args:
            rewind: takes the random numbers back to what they are now, and the simulator to another state.
        """
        left = []
        for _ in range(2):
            self._fill()
            left.append([*self._lanes.values(), *self._fresh.values()])
            rewind()
        check_equal(["what a reset leaves"] * len(left[0]), left[0], left[1])
        for _ in range(_RESETS_TO_TRY):
            self._fill()
        self._next = self._state.layout.n

    def state_dict(self) -> dict[str, Any]:
        """The environments in the pool."""
        return {"lanes": self._lanes, "fresh": self._fresh, "next": self._next}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self._lanes, self._fresh, self._next = state_dict["lanes"], state_dict["fresh"], state_dict["next"]

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
        places = ended.nonzero().squeeze(-1)
        while len(places):
            if self._next == len(ended):
                try:
                    self._fill()
                except NotCompiled:  # it has drawn something else for all environments
                    return False
                self._state.attach()
            n_now = min(len(places), len(ended) - self._next)
            now, places = places[:n_now], places[n_now:]
            fresh = slice(self._next, self._next + n_now)
            self._next += n_now
            for kind, lanes in self._lanes.items():
                self._state.buffers[kind][lanes[:, None], now] = self._fresh[kind][:, fresh]
        return True

    def _fill(self) -> None:
        """Resets all environments, keeps them, and puts those in use back."""
        flat, simulator = self._state, self._state.simulator
        with left_as_it_is(simulator):
            # The tensors get memory of their own: writes to those that share it are counted together.
            before = Places(simulator)
            own = {id(tensor): tensor.clone() for tensor in before.tensors}
            before.put([own[id(tensor)] for tensor in before.tensors])
            held = [(tensor, n_writes(tensor), tensor.clone()) for tensor in Places(simulator).tensors]
            self._reset()
            after = Places(simulator)
            if difference := before.difference(after):
                raise NotCompiled(f"a reset does more than to write tensors: {difference}")
            buffers = flat.layout.empty()
            lanes: dict[str, list[int]] = {kind: [] for kind in buffers}
            for number, ((old, writes, values), new) in enumerate(zip(held, after.tensors, strict=True)):
                if new is old and n_writes(new) == writes:
                    continue
                if (slot := flat.slots[number]) is None:
                    check_equal([f"{before.paths[number]}, which all environments share,"], [values], [new])
                else:
                    flat.layout.view(buffers, slot).copy_(new)
                    lanes[slot.kind] += slot.lanes
        self._lanes = {kind: torch.tensor(sorted({*numbers}), dtype=torch.long) for kind, numbers in lanes.items()}
        self._fresh = {kind: buffers[kind][self._lanes[kind], : flat.layout.n] for kind in lanes}
        self._next = 0
