"""A function of tensors with a row for each environment, compiled: one loop over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchrl_trpo.kernels.buffers import Buffers, Draws, NotCompiled
from torchrl_trpo.kernels.compiler import Call, Function
from torchrl_trpo.kernels.cpp import source
from torchrl_trpo.kernels.lanes import Lanes, Lowered
from torchrl_trpo.kernels.writer import Guard, Store


class RowFunction:
    """A function of tensors with a row for each environment, compiled.

    Args:
        lowered: the function, lowered.
        layout: the number of rows, and the room for them.
        names: the inputs, in the order of ``inputs``.
        by_row: results that are written as rows, into tensors ``[n, *shape]`` with any stride between rows.
        by_lane: results that are written as lanes.
        guards: the values on which the function branched, and what they must be.

    Attributes:
        inputs: the addresses of the inputs: lanes, or a tensor that all rows share.
        outputs: the addresses of the results.
        strides: of the results that are written as rows, in numbers.
        draws: the random numbers that a call draws.

    Raises:
        NotCompiled: if a result has no row for each environment, or the compiler fails.
    """

    def __init__(
        self,
        lowered: Lowered,
        layout: Buffers,
        names: Sequence[str],
        *,
        by_row: Sequence[Lanes] = (),
        by_lane: Sequence[Lanes] = (),
        guards: Sequence[tuple[Lanes, Any]] = (),
    ) -> None:
        self._layout = layout
        self.draws = Draws(layout, lowered.draws)
        places = {name: (number, 0) for number, name in enumerate(names)}
        places |= {f"draw{number}": (len(names) + number, 0) for number in range(len(lowered.draws))}
        stores = []
        for number, lanes in enumerate([*by_row, *by_lane]):
            values = lanes.of_rows()
            if values is None:
                raise NotCompiled("a result has no row for each environment")
            for lane, value in enumerate(values.flat):
                value = lowered.statements.convert(value, lanes.kind)
                stores.append(Store(value, lanes.kind, number, lane, number < len(by_row)))
        checks = [Guard.of(lowered.statements, lanes, expected) for lanes, expected in guards]
        self._run = Function(source(lowered.statements.all, places, stores, checks))
        self._addresses = np.zeros(len(names) + len(lowered.draws), np.uint64)
        self.inputs = self._addresses[: len(names)]
        self._addresses[len(names) :] = self.draws.addresses
        self.outputs = np.zeros(len(by_row) + len(by_lane), np.uint64)
        self.strides = np.zeros(len(by_row) + len(by_lane), np.int64)
        self._pointers = [array.ctypes.data for array in (self._addresses, self.outputs, self.strides)]

    def call(self) -> Call:
        """The function, for C++ to call. Its random numbers come behind its inputs."""
        return self._run.on(*self._pointers)

    def __call__(self) -> bool:
        """Calls the function. Random numbers are drawn from PyTorch's global generator, as the function draws them.

        Returns:
            Whether the results are right: the function branches as it did when it was traced. If they are not, nothing
            has been drawn.
        """
        generator = torch.get_rng_state() if self.draws.size else None
        self.draws.draw({})
        holds = bool(self._run(self._layout.n, self._layout.padded, *self._pointers))
        if not holds and generator is not None:
            torch.set_rng_state(generator)
        return holds
