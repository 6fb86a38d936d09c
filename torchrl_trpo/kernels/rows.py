"""Statements for one row as a function of a batch, where the batch is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from torchrl_trpo.kernels.compiler import Call, Function
from torchrl_trpo.kernels.cpp import source
from torchrl_trpo.kernels.cuda import Kernel
from torchrl_trpo.kernels.lanes import Statement
from torchrl_trpo.kernels.writer import Guard, Store


class RowsOnCpu:
    """A function of a batch in memory, compiled.

    Args:
        code: the code.
    """

    def __init__(self, code: str) -> None:
        self._function = Function(code)

    def __call__(self, n: int, padded: int, inputs: np.ndarray, outputs: np.ndarray) -> bool:
        """Calls the function; see :func:`compile_rows`."""
        return bool(self._function(n, padded, inputs.ctypes.data, outputs.ctypes.data, 0))

    def on(self, inputs: np.ndarray, outputs: np.ndarray) -> Call:
        """The function with arguments, for C++ to call."""
        return self._function.on(inputs.ctypes.data, outputs.ctypes.data)


def compile_rows(
    device: torch.device,
    statements: Sequence[Statement],
    inputs: Mapping[str, tuple[int, int]],
    stores: Sequence[Store],
    guards: Sequence[Guard],
) -> RowsOnCpu | Kernel:
    """Compiles statements, as :func:`~torchrl_trpo.kernels.cpp.source` says, or as a CUDA kernel.

    Args:
        device: where the buffers are.
        statements: the statements.
        inputs: by the names of the inputs, the number of the input buffer and the row where they begin.
        stores: what is written.
        guards: what must hold.

    Returns:
        The function, of the numbers of rows and of padded rows, and of the addresses of the input and output buffers,
        uint64. It returns whether the guards hold.
    """
    if device.type != "cpu":
        return Kernel(device, statements, inputs, stores, guards)
    return RowsOnCpu(source(statements, inputs, stores, guards))
