"""Tensors with a row for each environment, as lanes in memory, for compiled functions."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrl_trpo.kernels.cpp import ROWS_AT_A_TIME
from torchrl_trpo.kernels.lanes import DTYPES, KINDS

DRAWN_IF = "drawn_if"
"""Stands for random numbers that are drawn under conditions."""


class NotCompiled(Exception):
    """A function that stays as it is, with the reason."""


REFUSALS = (NotCompiled, RuntimeError, ValueError, LookupError, NotImplementedError)
"""What is raised where someone's own function cannot be recorded, or not be compiled."""


def reason_of(error: BaseException) -> str:
    """Why a function stays as it is, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Slot(NamedTuple):
    """Where a tensor with a row for each environment is in the buffers.

    Attributes:
        kind: the kind of its numbers, and so the buffer.
        lane: the first of its lanes in the buffer.
        shape: its shape without the environments.
        strides: its strides, with the environments.
    """

    kind: str
    lane: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def buffer(self) -> int:
        """The number of the buffer."""
        return list(DTYPES).index(self.kind)

    @property
    def lanes(self) -> range:
        """The tensor's lanes in the buffer."""
        return range(self.lane, self.lane + math.prod(self.shape))


class Buffers:
    """Tensors with a row for each environment, as lanes: one buffer ``[lanes, padded]`` for each kind of numbers.

    Args:
        n: the number of environments.
        device: where buffers are.

    Attributes:
        padded: the number of environments that a buffer has room for.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n, self.device = n, torch.device(device)
        self.padded = math.ceil(n / ROWS_AT_A_TIME) * ROWS_AT_A_TIME
        self._n_lanes = dict.fromkeys(DTYPES, 0)

    def add(self, kind: str, shape: Sequence[int]) -> Slot:
        """Makes room for a tensor ``[n, *shape]``."""
        strides = (1, *(self.padded * math.prod(shape[dim + 1 :]) for dim in range(len(shape))))
        slot = Slot(kind, self._n_lanes[kind], tuple(shape), strides)
        self._n_lanes[kind] += math.prod(shape)
        return slot

    def empty(self) -> dict[str, Tensor]:
        """New buffers."""
        sizes = {kind: (self._n_lanes[kind], self.padded) for kind in DTYPES}
        return {kind: torch.empty(size, dtype=DTYPES[kind], device=self.device) for kind, size in sizes.items()}

    def view(self, buffers: dict[str, Tensor], slot: Slot) -> Tensor:
        """The tensor in a slot, ``[n, *shape]``, which shares the memory of the buffers."""
        return buffers[slot.kind].as_strided((self.n, *slot.shape), slot.strides, slot.lane * self.padded)


class Columns:
    """Tensors ``[n, *shape]`` in buffers of their own, which stay where they are; zero at first.

    Args:
        layout: the layout of the buffers.
        slots: where the tensors are in them.

    Attributes:
        buffers: the buffers.
        tensors: the tensors.
        addresses: where their lanes are.
    """

    def __init__(self, layout: Buffers, slots: Sequence[Slot]) -> None:
        self.buffers = {kind: buffer.zero_() for kind, buffer in layout.empty().items()}
        self.tensors = [layout.view(self.buffers, slot) for slot in slots]
        self.addresses = np.array([tensor.data_ptr() for tensor in self.tensors], np.uint64)

    @classmethod
    def like(cls, n: int, tensors: Sequence[Tensor]) -> Columns:
        """Room for tensors like these, but with ``n`` rows; NotCompiled is raised if there are none of their type."""
        layout = Buffers(n, tensors[0].device if tensors else "cpu")
        for tensor in tensors:
            if tensor.dtype not in KINDS:
                raise NotCompiled(f"a tensor is of {tensor.dtype}")
        return cls(layout, [layout.add(KINDS[tensor.dtype], tensor.shape[1:]) for tensor in tensors])

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors ``[n, *shape]``."""
        for column, tensor in zip(self.tensors, tensors, strict=True):
            column.copy_(tensor.detach())


class Draws:
    """The random tensors of a compiled function.

    Args:
        layout: the number of rows, and where they are.
        draws: for each its shape as traced, and the method of ``Tensor`` that fills one, with its arguments. With
            :data:`DRAWN_IF` for a method, it has numbers in [0, 1) of which each row may need the first ones.

    Attributes:
        methods: as ``draws``.
        tensors: the tensors.
        addresses: where their lanes are.
        size: how many numbers they have.
    """

    def __init__(self, layout: Buffers, draws: Sequence[tuple[tuple[int, ...], str, tuple[float, ...]]]) -> None:
        self.methods = draws
        dtypes = [torch.int64 if method == "random_" else torch.float32 for _, method, _ in draws]
        shapes = [shape for shape, *_ in draws]
        empty = [torch.empty(s, dtype=t, device=layout.device) for s, t in zip(shapes, dtypes, strict=True)]
        columns = Columns.like(layout.n, empty)
        self.tensors, self.addresses = columns.tensors, columns.addresses
        self.size = sum(tensor.numel() for tensor in self.tensors)

    def draw(self, masks: Mapping[int, Tensor], n_used: int | None = None) -> None:
        """Draws them from the device's global generator, as the function does.

        Args:
            masks: by the numbers of random tensors the rows that are drawn, bool ``[n]``. Default: all.
            n_used: how many numbers each row needs of those that are drawn under a condition. Default: all.
        """
        pairs = zip(self.tensors, self.methods, strict=True)
        for number, (column, (_, method, parameters)) in enumerate(pairs):
            if method == DRAWN_IF:
                drawn = column.new_empty(column.shape[1] if n_used is None else n_used, len(column)).uniform_()
                column[:, : len(drawn)] = drawn.T
            elif number in masks:
                rows = masks[number].nonzero().squeeze(1)
                column[rows] = getattr(column.new_empty(len(rows), *column.shape[1:]), method)(*parameters)
            else:
                column.copy_(getattr(column.new_empty(column.shape), method)(*parameters))


class DrawsOfSteps:
    """The random tensors of a compiled function for several calls, drawn together.

    Args:
        layout: the number of rows, and where they are.
        draws: those of one call, none of which are drawn under a condition.
        n_steps: for how many calls there is room.

    Attributes:
        addresses: where their lanes are, ``[n_steps, n_draws]``.
    """

    def __init__(self, layout: Buffers, draws: Draws, n_steps: int) -> None:
        self._pairs, fills = [], []
        for column, (_, method, parameters) in zip(draws.tensors, draws.methods, strict=True):
            drawn = column.new_empty(n_steps, *column.shape)
            lanes = column.new_zeros(n_steps, column[0].numel(), layout.padded)
            self._pairs.append((lanes[..., : layout.n], drawn.view(n_steps, layout.n, -1).mT))
            fills.append([functools.partial(getattr(each, method), *parameters) for each in drawn.unbind()])
        addresses = [[lanes[step].data_ptr() for lanes, _ in self._pairs] for step in range(n_steps)]
        self.addresses = np.array(addresses, np.uint64).reshape(n_steps, -1)
        self._fills = [*zip(*fills, strict=True)]

    def draw(self, n_steps: int) -> None:
        """Draws those of the first steps from the device's global generator, as so many calls do."""
        for fills in self._fills[:n_steps]:
            for fill in fills:
                fill()
        for lanes, drawn in self._pairs:
            lanes[:n_steps].copy_(drawn[:n_steps])


def unused_size(tensors: Iterable[Tensor]) -> int:
    """A number of environments that no dimension of the tensors has."""
    sizes = {size for tensor in tensors for size in tensor.shape}
    return next(n for n in itertools.count(7) if n not in sizes)
