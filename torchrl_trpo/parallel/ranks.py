"""The processes that share an update: what they add up, agree on and pass to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchrl_trpo.errors import AgreedError, SettingError

_Result = TypeVar("_Result")


class RankLostError(RuntimeError):
    """Another process of the job has ended, or cannot be reached any more."""


class Ranks:
    """The processes of a ``torch.distributed`` group, each with rows of its own; or this process alone.

    Each method is a collective call: all ranks make it, in the same order, with tensors on the group's kind of device
    (NCCL: the GPU). Alone, they are free and change nothing, to the bit. A copy is the same group.

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
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor over the ranks, in place: all have the same bits afterwards.

        Args:
            tensor: this rank's part, contiguous, of the same shape in all ranks.

        Returns:
            The tensor itself.
        """
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks' entries, in place.

        Args:
            tensor: this rank's, contiguous, of the same shape in all ranks.

        Returns:
            The tensor itself.
        """
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def first_(self, tensor: Tensor) -> Tensor:
        """Overwrites a tensor with the first rank's.

        Args:
            tensor: contiguous, of the same shape in all ranks.

        Returns:
            The tensor itself.
        """
        if self.size > 1:
            self._call(dist.broadcast, tensor, group=self.group, group_src=0)
        return tensor

    def concat(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, one rank's after the other's.

        Args:
            rows: this rank's, ``[N, ...]`` with any ``N``.

        Returns:
            All rows, the same in all ranks.
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
        """The values of all ranks, in the first; elsewhere an empty list.

        Args:
            value: this rank's; anything that can be pickled.

        Returns:
            The values, by rank.
        """
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        self._call(dist.gather_object, value, values, group=self.group, group_dst=0)
        return values or []

    def scatter_objects(self, values: Sequence[Any]) -> Any:
        """Gives each rank its value.

        Args:
            values: one for each rank, in the first; elsewhere not read.

        Returns:
            This rank's.
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
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise  # a mistake in the call, not in the connection
            raise RankLostError(
                f"rank {self.rank} of {self.size}: another process of the job has ended or cannot be reached. What it "
                f"said itself, if anything, stands above. Here it is: {str(error).splitlines()[0]}"
            ) from error


ALONE = Ranks()
"""This process alone."""


def agreed(action: Callable[[], _Result], ranks: Ranks) -> _Result:
    """What the first rank alone does, told to all; if it finds that settings cannot be, it is so for all.

    Args:
        action: what it does.
        ranks: the ranks.

    Returns:
        What the action gave.

    Raises:
        AgreedError: if it raised a :class:`~torchrl_trpo.errors.SettingError`.
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
    """Checks that all ranks hold the same bits; a machine that rounds otherwise would let them drift apart unseen.

    Args:
        tensors: the parameters.
        ranks: the ranks.

    Raises:
        RuntimeError: if they do not.
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
    """Checks that the sequences of all ranks are of one length.

    Args:
        steps: the steps of this rank's.
        ranks: the ranks.
        device: where their tensors are.

    Raises:
        ValueError: if they are not, in all ranks.
    """
    if ranks.size == 1:
        return
    largest, smallest = ranks.max_(torch.tensor([steps, -steps], device=device)).tolist()
    if largest != -smallest:
        raise ValueError(
            f"the processes have sequences of {-smallest} to {largest} steps. Legal with a recurrent network: one "
            "length."
        )
