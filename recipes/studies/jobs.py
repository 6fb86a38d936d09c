"""Runs of the recipes in several processes, one thread each; finished runs are not repeated."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from torchrl_trpo.config.overrides import compose_settings, written
from torchrl_trpo.errors import SettingError
from torchrl_trpo.reporting.record import flat, read_config
from torchrl_trpo.training.checkpoints import has_checkpoint
from torchrl_trpo.training.policy import settle_compilation

CONFIG = Path(__file__).parents[1] / "config"

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def study_parser(name: str, description: str) -> ArgumentParser:
    """The command line of a study, with the options that all studies have."""
    parser = ArgumentParser(f"python -m torchrl_trpo.recipes.studies.{name}", description=description)
    parser.add_argument("--output", type=Path, default=Path("outputs") / name, help="where the runs go")
    parser.add_argument("--report", type=Path, help="where tables and figures go (docs/results; of a part: the output)")
    parser.add_argument(
        "--redraw", action="store_true", help="trains nothing: writes the report again from its CSV file"
    )
    parser.add_argument("--workers", type=_workers, default=2, help="processes, of one thread each (default: 2)")
    return parser


def _workers(text: str) -> int:
    if text.isdecimal() and int(text):
        return int(text)
    raise ArgumentTypeError(f"{text!r}. Legal: a whole number of at least 1.")


def make_report_folder(parser: ArgumentParser, report: Path) -> Path:
    """Makes the folder of a report, before anything is trained; ends the command if it cannot be made."""
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--report: {str(report)!r} cannot be made ({error}). Legal: a folder.")
    return report


def train(recipe: str, cfg: DictConfig) -> None:
    """Trains in ``cfg.output_dir``, unless a finished run is there; a run that was stopped is resumed.

    ``cfg`` is from :func:`config`. The output goes to ``output.txt`` beside the metrics.
    """
    torch.set_num_threads(1)
    folder = Path(cfg.output_dir)
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (
            (folder / "output.txt").open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            importlib.import_module(f"torchrl_trpo.recipes.{recipe}").train(cfg)


def config(recipe: str, overrides: Sequence[str], folder: Path) -> DictConfig:
    """Composes the config of a run, which resumes the run in its folder if there is one with the same settings."""
    settings = [*overrides, "film=false", f"output_dir={written(str(folder))}"]
    cfg = settle_compilation(compose_settings(settings, CONFIG, recipe)[0])
    can_be_resumed = has_checkpoint(folder)
    if can_be_resumed or (folder / "summary.json").exists():
        now: Any = OmegaConf.to_container(cfg, resolve=True)
        check_same(read_config(folder), now, folder)
    if can_be_resumed:
        cfg.resume = str(folder)
    return cfg


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raises SettingError if a finished or stopped run has other settings than those that are asked for.

    Settings that the run in the folder does not know may have any value now.
    """
    was, is_now = flat(before), flat(now)
    names = {name for name in was | is_now if name.startswith("env.kwargs") or (name in was and name in is_now)}
    changed = [
        f"{name} was {was.get(name)}, now {is_now.get(name)}"
        for name in sorted(names - {"resume", "output_dir"})
        if was.get(name) != is_now.get(name)
    ]
    if changed:
        raise SettingError(
            f"{str(folder)!r} holds a run with other settings: {'; '.join(changed)}. Legal: to delete it, or another "
            "output folder."
        )


def run_all(function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, workers: int) -> dict[_Job, _Result]:
    """Runs jobs in other processes; gives the results by job, in the order of the jobs.

    When a job fails, its error is printed, the others go on, and the command ends after them. After an interrupt no
    further job begins. When this process is killed, the others get SIGTERM. ``function`` is pickled, so a module must
    define it. BrokenProcessPool is raised if a process was killed, perhaps for lack of memory.
    """
    results: dict[_Job, _Result] = {}
    context, waiting = multiprocessing.get_context("spawn"), iter(jobs)
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool, tqdm(total=len(jobs), unit="run") as bar:
        running = {pool.submit(_run, function, job): job for job in itertools.islice(waiting, workers)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    results[job] = future.result()
                    bar.set_postfix_str(str(job))
                except BrokenProcessPool:
                    raise
                except Exception:
                    bar.write(f"{job} failed:\n{traceback.format_exc()}")
                bar.update()
                running |= {pool.submit(_run, function, job): job for job in itertools.islice(waiting, 1)}
    if failed := [job for job in jobs if job not in results]:
        sys.exit(f"error: {len(failed)} jobs failed, see above and output.txt in their folders: {failed}")
    return {job: results[job] for job in jobs}


def _run(function: Callable[[_Job], _Result], job: _Job) -> _Result:
    """Runs a job, and ends this process after one that SIGTERM has stopped since the parent has ended."""
    try:
        return function(job)
    finally:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)  # the pool would wait for ever for another job


def _end_with_parent() -> None:
    """Lets this process have SIGTERM when its parent has ended, at which a run writes a checkpoint and stops."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait_for([parent.sentinel] if parent else [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
