"""The processes that share an update, and the collective calls by which they exchange data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchrl_trpo.errors import AgreedError, SettingError

_Result = TypeVar("_Result")


class RankLostError(RuntimeError):
    """Another process of the job has ended or cannot be reached."""


class Ranks:
    """The processes of a ``torch.distributed`` group, each with its own rows; or this process alone.

    Each method is a collective call: all ranks make it, in the same order, with tensors on the group's kind of device
    (NCCL: the GPU). In a single process the calls cost nothing and return their input, bit for bit. A copy has the same
    group.

    Args:
        group: the process group, such as ``torch.distributed.group.WORLD``; None for this process alone.

    Raises:
        ValueError: if this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("process_group: this process is not in it. Legal: a group that it is in, or None.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """The same ranks: a group cannot be copied."""
        return self

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all ranks."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place; all ranks get the same bits.

        Args:
            tensor: this rank's part, contiguous, of the same shape on all ranks.

        Returns:
            The tensor itself.
        """
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> Tensor:
        """Takes the entrywise maximum over the ranks, in place.

        Args:
            tensor: this rank's part, contiguous, of the same shape on all ranks.

        Returns:
            The tensor itself.
        """
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def first_(self, tensor: Tensor) -> Tensor:
        """Overwrites a tensor with that of rank 0.

        Args:
            tensor: contiguous, of the same shape on all ranks.

        Returns:
            The tensor itself.
        """
        if self.size > 1:
            self._call(dist.broadcast, tensor, group=self.group, group_src=0)
        return tensor

    def concat(self, rows: Tensor) -> Tensor:
        """Concatenates the rows of all ranks, in the order of the ranks.

        Args:
            rows: this rank's rows, ``[N, ...]``; ``N`` may differ between ranks.

        Returns:
            All rows, the same on all ranks.
        """
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.long, device=rows.device)
        counts[self.rank] = len(rows)
        sizes = self.sum_(counts).tolist()
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        self._call(dist.all_gather, parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_objects(self, value: Any) -> list[Any]:
        """Gathers the values of all ranks on rank 0.

        Args:
            value: this rank's value; anything that can be pickled.

        Returns:
            The values, by rank; an empty list on the other ranks.
        """
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        self._call(dist.gather_object, value, values, group=self.group, group_dst=0)
        return values or []

    def scatter_objects(self, values: Sequence[Any]) -> Any:
        """Sends each rank its value from rank 0.

        Args:
            values: one for each rank; only those of rank 0 are read.

        Returns:
            This rank's value.
        """
        if self.size == 1:
            return values[0]
        received: list[Any] = [None]
        given = list(values) if self.is_first else None
        self._call(dist.scatter_object_list, received, given, group=self.group, group_src=0)
        return received[0]

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            self._call(dist.all_reduce, tensor, op=operation, group=self.group)
        return tensor

    def _call(self, collective: Any, *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            # NCCL raises a DistError. Gloo raises a plain RuntimeError, for a lost connection as for a wrong argument;
            # only the text differs: a lost connection is reported with its place in gloo's source, ".../gloo/...",
            # and a wrong argument by "ProcessGroupGloo::...".
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RankLostError(
                f"rank {self.rank} of {self.size}: another process of the job has ended or cannot be reached. What it "
                f"printed itself, if anything, stands above. The error here: {str(error).splitlines()[0]}"
            ) from error


ALONE = Ranks()
"""A single process."""


def agreed(action: Callable[[], _Result], ranks: Ranks) -> _Result:
    """Runs an action on rank 0 and broadcasts its result; a ``SettingError`` is re-raised on every rank.

    Args:
        action: the action; its result must be picklable.
        ranks: the ranks.

    Returns:
        The action's result, on all ranks.

    Raises:
        AgreedError: if the action raised a :class:`~torchrl_trpo.errors.SettingError`.
    """
    outcome: Any = None
    if ranks.is_first:
        try:
            outcome = action()
        except SettingError as error:
            outcome = error
    outcome = ranks.scatter_objects([outcome] * ranks.size)
    if isinstance(outcome, SettingError):
        raise AgreedError(*outcome.args) from outcome
    return outcome


def check_same_bits(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Checks that all ranks hold the same bits: machines that round differently would drift apart unnoticed.

    Args:
        tensors: the parameters.
        ranks: the ranks.

    Raises:
        RuntimeError: if they differ.
    """
    if ranks.size == 1:
        return
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.stack([tensor.detach().flatten().view(words[tensor.element_size()]).sum() for tensor in tensors])
    largest = ranks.max_(torch.cat([sums, -sums]))
    if bool((largest[: len(sums)] + largest[len(sums) :]).any()):
        raise RuntimeError(
            f"rank {ranks.rank}: the parameters of the {ranks.size} processes are not the same to the bit. Legal: "
            "processors of one kind, and the same versions of all libraries."
        )


def check_same_length(steps: int, ranks: Ranks, device: torch.device) -> None:
    """Checks that the sequences of all ranks have the same length.

    Args:
        steps: the length of this rank's sequences, in steps.
        ranks: the ranks.
        device: the device of the group's tensors.

    Raises:
        ValueError: on all ranks, if the lengths differ.
    """
    if ranks.size == 1:
        return
    largest, smallest = ranks.max_(torch.tensor([steps, -steps], device=device)).tolist()
    if largest != -smallest:
        raise ValueError(
            f"the processes have sequences of {-smallest} to {largest} steps. Legal with a recurrent network: one "
            "length."
        )
