"""Many runs of the recipes: each in a process of one thread, some at a time, and none done twice."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from torchrl_trpo.settings import check_overrides
from torchrl_trpo.suggest import SettingError

CONFIG = Path(__file__).parent / "config"

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def train(recipe: str, cfg: DictConfig) -> None:
    """Trains in ``cfg.output_dir``, unless it is done; a run that was stopped is resumed.

    Args:
        recipe: the recipe's name, such as ``"hatrpo"``.
        cfg: its config, from :func:`config`; what is printed goes to ``output.txt`` beside the metrics.
    """
    torch.set_num_threads(1)
    folder = Path(cfg.output_dir)
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (
            (folder / "output.txt").open("a") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            importlib.import_module(f"torchrl_trpo.recipes.{recipe}").train(cfg)


def config(recipe: str, overrides: Sequence[str], folder: Path) -> DictConfig:
    """The config of a run, which continues what its folder holds.

    Args:
        recipe: the recipe's name.
        overrides: its settings, as on the command line.
        folder: the run's folder.

    Returns:
        The config.

    Raises:
        SettingError: if the folder holds a run with other settings.
    """
    checked = check_overrides([*overrides, "film=false", f"output_dir={json.dumps(str(folder))}"], CONFIG, recipe)
    with initialize_config_dir(str(CONFIG), version_base=None):
        cfg = compose(recipe, checked)
    if not list(folder.glob("checkpoints/checkpoint-*")):
        return cfg
    before: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    now: Any = OmegaConf.to_container(cfg, resolve=True)
    names = (before.keys() & now.keys()) - {"resume", "output_dir"}
    changed = [f"{name} was {before[name]}, now {now[name]}" for name in sorted(names) if before[name] != now[name]]
    if changed:
        raise SettingError(
            f"{str(folder)!r} holds a run with other settings: {'; '.join(changed)}. Legal: to delete it, or another "
            "output folder."
        )
    cfg.resume = str(folder)
    return cfg


def run_all(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], *, workers: int
) -> tuple[dict[_Job, _Result], list[_Job]]:
    """Does jobs in processes of their own, and goes on when one fails.

    Args:
        function: what does a job, and can be found in a module.
        jobs: the jobs.

    Keyword Args:
        workers: how many at a time.

    Returns:
        The results by job, in the jobs' order, and the jobs that failed, whose errors are printed.
    """
    results: dict[_Job, _Result] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool, tqdm(total=len(jobs), unit="run") as bar:
        running = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(running):
                job = running[future]
                try:
                    results[job] = future.result()
                    bar.set_postfix_str(str(job))
                except Exception:
                    bar.write(f"{job} failed:\n{traceback.format_exc()}")
                bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an interrupt, what has not begun does not
    return {job: results[job] for job in jobs if job in results}, [job for job in jobs if job not in results]
