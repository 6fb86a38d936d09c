"""A run that torchrun starts in several processes: who they are, and how they meet."""

from __future__ import annotations

import atexit
import os
import socket
import time
import uuid

import torch
import torch.distributed as dist

from torchrl_trpo.parallel.ranks import ALONE, Ranks


def is_job() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this process speaks for the job: its first one, or one that torchrun did not start."""
    return not is_job() or int(os.environ["RANK"]) == 0


def job_name() -> str | None:
    """The job's name: torchrun's ``--rdzv-id``, or what ``--standalone`` draws; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID") if is_job() else None
    return None if name == "none" else name


def job_id() -> str | None:
    """What tells the job from others, however often its processes are started; None without a job.

    A job without a name is known by the torchrun that started this process.
    """
    return job_name() or (f"torchrun {os.getppid()} on {socket.gethostname()}" if is_job() else None)


def local_rank() -> int:
    """This process's number among those of the job on its machine, 0 without a job."""
    return int(os.environ["LOCAL_RANK"]) if is_job() else 0


def job_ranks(device: torch.device) -> Ranks:
    """Joins the processes of the job, once: NCCL between CUDA's GPUs, gloo between CPUs.

    Without a job, a process group that is there is not touched: it belongs to someone else, such as TorchRL's
    distributed collectors.

    Args:
        device: the device of this process.

    Returns:
        The job's ranks; this process alone if torchrun did not start it, or started it alone.
    """
    if not is_job() or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    if not dist.is_initialized():
        backend = "gloo"
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(_agreed_name(store, rank, size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.group.WORLD)


def _agreed_name(store: dist.Store, rank: int, size: int) -> str:
    """A name that only the processes of this start of the job know, drawn by the first one.

    torchrun's store outlives the processes: they must not read the addresses of those before. Its counts of restarts
    differ from machine to machine. So each process asks under a name of its own, which only one that lives can answer.

    Args:
        store: what all of them share.
        rank: this process's number.
        size: how many there are.

    Returns:
        The name.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return name
    waiting = set(range(1, size))
    answered: dict[int, bytes] = {}
    until = time.monotonic() + dist.default_pg_timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"heard/{own}/{other}"]):
                waiting.remove(other)
            elif store.check([f"asks/{other}"]) and (asks := store.get(f"asks/{other}")) != answered.get(other):
                store.set(f"answer/{asks.decode()}", own)
                answered[other] = asks  # of a process that has ended, perhaps: the living one will ask anew
        if time.monotonic() > until:
            raise TimeoutError(f"the processes {sorted(waiting)} of the job's {size} have not come.")
        time.sleep(0.01)
    return own
