"""A function of tensors with a row for each environment, compiled: one loop over the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_trpo.envs.flat_state import Buffers, NotCompiled
from torchrl_trpo.kernels.aten import Lowered
from torchrl_trpo.kernels.compiler import build
from torchrl_trpo.kernels.cpp import Guard, Store, source
from torchrl_trpo.kernels.lanes import DTYPES, Lanes


class Columns:
    """Tensors ``[n, *shape]``, whose rows are next to each other in memory: each is lanes ``[lanes, padded]``.

    Args:
        tensors: the tensors.

    Attributes:
        tensors: the tensors.
        addresses: where their lanes are.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.addresses = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)

    @classmethod
    def like(cls, layout: Buffers, tensors: Sequence[Tensor]) -> Columns:
        """Room for tensors like these, which may have another number of rows."""
        columns = []
        for tensor in tensors:
            shape = tensor.shape[1:]
            if tensor.dtype not in DTYPES.values():
                raise NotCompiled(f"a tensor is of {tensor.dtype}")
            strides = (1, *(layout.padded * math.prod(shape[dim + 1 :]) for dim in range(len(shape))))
            lanes = torch.zeros(math.prod(shape), layout.padded, dtype=tensor.dtype)
            columns.append(lanes.as_strided((layout.n, *shape), strides))
        return cls(columns)

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors ``[n, *shape]``."""
        for column, tensor in zip(self.tensors, tensors, strict=True):
            column.copy_(tensor)


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
        self._draws = lowered.draws
        dtypes = [torch.int64 if method == "random_" else torch.float32 for _, method, _ in self._draws]
        shapes = [shape for shape, *_ in self._draws]
        self._drawn = Columns.like(layout, list(map(lambda s, d: torch.empty(s, dtype=d), shapes, dtypes)))
        places = {name: (number, 0) for number, name in enumerate(names)}
        places |= {f"draw{number}": (len(names) + number, 0) for number in range(len(self._draws))}
        stores = []
        for number, lanes in enumerate([*by_row, *by_lane]):
            values = lanes.of_rows()
            if values is None:
                raise NotCompiled("a result has no row for each environment")
            for lane, value in enumerate(values.flat):
                value = lowered.statements.convert(value, lanes.kind)
                stores.append(Store(value, lanes.kind, number, lane, number < len(by_row)))
        checks = [Guard.of(lowered.statements, lanes, expected) for lanes, expected in guards]
        self._run = build(source(lowered.statements.all, places, stores, checks))
        self._addresses = np.zeros(len(names) + len(self._draws), np.uint64)
        self.inputs = self._addresses[: len(names)]
        self._addresses[len(names) :] = self._drawn.addresses
        self.outputs = np.zeros(len(by_row) + len(by_lane), np.uint64)
        self.strides = np.zeros(len(by_row) + len(by_lane), np.int64)
        self._pointers = [array.ctypes.data for array in (self._addresses, self.outputs, self.strides)]

    def __call__(self) -> bool:
        """Calls the function. Random numbers are drawn from PyTorch's global generator, as the function draws them.

        Returns:
            Whether the results are right: the function branches as it did when it was traced.
        """
        n = self._layout.n
        for column, (shape, method, parameters) in zip(self._drawn.tensors, self._draws, strict=True):
            column.copy_(getattr(column.new_empty((n, *shape[1:])), method)(*parameters))
        return bool(self._run(n, self._layout.padded, *self._pointers))
