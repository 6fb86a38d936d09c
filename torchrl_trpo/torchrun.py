"""A run that torchrun starts in several processes: who they are, and how they meet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from torchrl_trpo.ranks import Ranks


def is_job() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this process speaks for the job: its first one, or one that torchrun did not start."""
    return not is_job() or int(os.environ["RANK"]) == 0


def job_id() -> str | None:
    """What tells the job from others: torchrun's ``--rdzv-id``, or what ``--standalone`` draws; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID") if is_job() else None
    return None if name == "none" else name


def is_restarted() -> bool:
    """Whether torchrun has started the job anew, after a process of it had ended."""
    return is_job() and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0


def local_rank() -> int:
    """This process's number among those of the job on its machine, 0 without a job."""
    return int(os.environ["LOCAL_RANK"]) if is_job() else 0


@contextlib.contextmanager
def job_ranks(device: torch.device) -> Iterator[Ranks]:
    """Joins the processes of the job: NCCL between GPUs, gloo between CPUs.

    A process group that is there already is not touched: it belongs to someone else (TorchRL's distributed collectors).

    Args:
        device: the device of this process.

    Yields:
        The job's ranks; this process alone if torchrun did not start it, or started it alone.
    """
    if not is_job() or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives the processes: those of this start must not read the addresses of those before.
    store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
