"""Runs a function in several processes that share a process group, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PRELOADED = ["torchrl_trpo.envs", "tests.cases"]
"""What processes are forked with, so that they need not import it."""


def on_ranks(size, function, *args):
    """Calls ``function(*args)`` in ``size`` processes of a gloo group; gives what each returned, by rank.

    The function is one of a module. A rank that raises makes this raise, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = multiprocessing.get_context("forkserver")
        ranks = range(size)
        processes = [context.Process(target=_run, args=(folder, rank, size, function, args)) for rank in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        problems = [problem.read_text() for problem in sorted(Path(folder).glob("error-*"))]
        if problems:
            raise AssertionError("\n".join(problems))
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in ranks]


def _run(folder, rank, size, function, args):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
        torch.save(function(*args), Path(folder) / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
