"""Runs a function in processes that share a process group, as torchrun would start them; a module as a command."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PRELOADED = ["torchrl_trpo.envs", "tests.cases", "tests.training.test_resume"]
"""What processes are forked with, so that they need not import it."""


def on_ranks(size, function, *args, job=None, lost=()):
    """Calls ``function(*args)`` in ``size`` processes of a gloo group; gives what each returned, by rank.

    The function is one of a module. A rank that raises makes this raise, with its traceback; the ranks that are
    ``lost`` return nothing. With a ``job``, the processes are as torchrun starts them for the job of that name, whose
    ``restarts`` may follow a colon: they have no group yet.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings = (folder, size, job, free.getsockname()[1])
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = multiprocessing.get_context("forkserver")
        ranks = range(size)
        processes = [context.Process(target=_run, args=(settings, rank, function, args)) for rank in ranks]
        free.close()
        for process in processes:
            process.start()
        while running := [process.sentinel for process in processes if process.is_alive()]:
            multiprocessing.connection.wait(running)
            if any(process.exitcode and rank not in lost for rank, process in enumerate(processes)):
                for process in processes:
                    process.kill()  # the others would wait for one that has failed
        for process in processes:
            process.join()
        problems = [problem.read_text() for problem in sorted(Path(folder).glob("error-*"))]
        if problems:
            raise AssertionError("\n".join(problems))
        left = [rank for rank in ranks if rank not in lost]
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in left]


def _run(settings, rank, function, args):
    folder, size, job, port = settings
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if job is None:
            store = dist.FileStore(f"{folder}/store", size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        else:
            name, _, restarts = job.partition(":")
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
            os.environ |= {"TORCHELASTIC_RUN_ID": name, "TORCHELASTIC_RESTART_COUNT": restarts or "0"}
        torch.save(function(*args), Path(folder) / f"result-{rank}")
        if job is None:
            dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


def run_command(module, arguments, folder):
    """``python -m module arguments`` in a folder, in a process that is forked with all that the module imports.

    Gives what ``subprocess.run`` gives: the exit code and what was written.
    """
    with tempfile.TemporaryDirectory() as place:
        multiprocessing.set_forkserver_preload(PRELOADED)
        written = [Path(place) / name for name in ("stdout", "stderr")]
        command = multiprocessing.get_context("forkserver").Process(
            target=_run_command, args=(module, arguments, folder, written)
        )
        command.start()
        command.join()
        return subprocess.CompletedProcess(arguments, command.exitcode, *(path.read_text() for path in written))


def _run_command(module, arguments, folder, written):
    os.chdir(folder)
    for number, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv[1:] = arguments
    sys.modules.pop(module, None)  # runpy warns of what was imported before
    runpy.run_module(module, run_name="__main__", alter_sys=True)
