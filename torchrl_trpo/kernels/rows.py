"""Statements for one row as a function of a batch, where the batch is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from torchrl_trpo.kernels.compiler import Function
from torchrl_trpo.kernels.cpp import source
from torchrl_trpo.kernels.cuda import Kernel
from torchrl_trpo.kernels.lanes import Statement
from torchrl_trpo.kernels.writer import Guard, Store


def compile_rows(
    device: torch.device,
    statements: Sequence[Statement],
    inputs: Mapping[str, tuple[int, int]],
    stores: Sequence[Store],
    guards: Sequence[Guard],
) -> Callable[[int, int, np.ndarray, np.ndarray], bool]:
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
    run = Function(source(statements, inputs, stores, guards))
    return lambda n, padded, read, written: bool(run(n, padded, read.ctypes.data, written.ctypes.data, 0))
