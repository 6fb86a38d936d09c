"""The processes that torchrun starts: their ranks, the job's name, and how they form a group."""

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
    """Whether this process prints for the job: it has rank 0, or torchrun did not start it."""
    return not is_job() or int(os.environ["RANK"]) == 0


def job_name() -> str | None:
    """The job's name: torchrun's ``--rdzv-id``, or the one that ``--standalone`` draws; None if there is none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID") if is_job() else None
    return None if name == "none" else name


def job_id() -> str | None:
    """An id of the job that stays the same when its processes are restarted; None without a job.

    A job without a name has the id of the torchrun process that started it.
    """
    return job_name() or (f"torchrun {os.getppid()} on {socket.gethostname()}" if is_job() else None)


def local_rank() -> int:
    """This process's number among the job's processes on this machine; 0 without a job."""
    return int(os.environ["LOCAL_RANK"]) if is_job() else 0


def job_ranks(device: torch.device) -> Ranks:
    """Forms the process group of the job, once: NCCL between GPUs of CUDA, gloo between CPUs.

    It gives this process alone if torchrun did not start it, or started only one. An existing process group is left
    alone then: it belongs to someone else, such as TorchRL's distributed collectors.
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
    """Agrees on a name for this start of the job, which rank 0 draws.

    torchrun's store outlives the processes, so that a restarted process could read the addresses of the processes
    before it. The count of restarts cannot serve as a name: it differs between machines. So each process asks under a
    random name of its own, and only a living rank 0 can answer it.
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
                answered[other] = asks  # perhaps of a process that has ended; the living one will ask again
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(waiting)} of the job's {size} processes did not start in time.")
        time.sleep(0.01)
    return own
