"""Trains all algorithms on all tasks with several seeds, evaluates them, and compares them.

    python -m torchrl_trpo.recipes.comparison
    python -m torchrl_trpo.recipes.comparison --tasks vmas/balance --seeds 0 1 --report outputs/comparison/report

What is run is config/comparison.yaml. Stopped, it goes on where it was. The report, in docs/results by default, has a
row of comparison.csv for each evaluation, comparison.md and the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import multiprocessing
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torchrl.envs.utils import RandomPolicy
from tqdm import tqdm

from torchrl_trpo.checkpoints import read_record
from torchrl_trpo.evaluation import play_episodes
from torchrl_trpo.policy import make_run_env, policy_at
from torchrl_trpo.recipes.comparison_report import write_report
from torchrl_trpo.seeding import untouched_generators
from torchrl_trpo.settings import check_overrides

CONFIG = Path(__file__).parent / "config"
COLUMNS = ("task", "algorithm", "seed", "iteration", "frames", "cpu_s", "evaluation_return", "evaluation_std")
"""The columns of ``comparison.csv``."""


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison, or with the algorithm ``random`` none at all."""

    task: str
    algorithm: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Where it goes.

        Args:
            root: the comparison's folder.

        Returns:
            The run's folder.
        """
        return root / self.task / self.algorithm / f"seed-{self.seed}"


def cells(plan: Mapping[str, Any]) -> list[Cell]:
    """The runs, a seed of everything before the next seed: a comparison that is stopped is one of fewer seeds.

    Args:
        plan: what ``config/comparison.yaml`` says.

    Returns:
        The runs.
    """
    algorithms = [*plan["algorithms"], "random"]
    return [Cell(task, name, seed) for seed in plan["seeds"] for task in plan["tasks"] for name in algorithms]


def run_cell(plan: Mapping[str, Any], cell: Cell, root: Path) -> list[dict[str, Any]]:
    """Trains and evaluates, or goes on with what was begun.

    Args:
        plan: what ``config/comparison.yaml`` says.
        cell: the run.
        root: the comparison's folder; what is printed goes to ``output.txt`` in the run's.

    Returns:
        The evaluations, with the entries :data:`COLUMNS`.
    """
    folder = cell.folder(root)
    done = folder / "comparison.json"
    if done.exists():
        return json.loads(done.read_text())
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output, _output_to(output):
        rows = _evaluate(plan, cell, folder)
    done.write_text(json.dumps(rows))
    return rows


def _config(plan: Mapping[str, Any], cell: Cell, folder: Path) -> DictConfig:
    """The config of a run, which its folder's checkpoints continue if there are any."""
    settings = plan["settings"][cell.task.partition("/")[0]]
    iterations = settings["train.total_frames"] // settings["train.frames_per_batch"]
    recipe = plan["algorithms"][0] if cell.algorithm == "random" else cell.algorithm
    overrides = [
        f"env={cell.task}",
        f"hyperparameters={plan['hyperparameters']}",
        f"seed={cell.seed}",
        *(f"{name}={value}" for name, value in settings.items()),
        f"checkpoint.every={max(1, iterations // plan['evaluation']['points'])}",
        f"checkpoint.keep={iterations}",
        f"output_dir={folder}",
        "film=false",
    ]
    if list(folder.glob("checkpoints/checkpoint-*")):
        overrides = [f"resume={folder}", f"output_dir={folder}"]
    checked = check_overrides(overrides, CONFIG, recipe)
    with initialize_config_dir(str(CONFIG), version_base=None):
        return compose(recipe, checked)


def _evaluate(plan: Mapping[str, Any], cell: Cell, folder: Path) -> list[dict[str, Any]]:
    cfg = _config(plan, cell, folder)
    checkpoints = []
    if cell.algorithm != "random":
        if not (folder / "summary.json").exists():
            importlib.import_module(f"torchrl_trpo.recipes.{cell.algorithm}").train(cfg)
        every = cfg.checkpoint.every
        found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoints/checkpoint-*")}
        checkpoints = [path for iteration, path in sorted(found.items()) if iteration and iteration % every == 0]
    record: Any = OmegaConf.to_container(cfg, resolve=True)
    episodes = plan["evaluation"]["episodes"][cell.task.partition("/")[0]]
    seed = plan["evaluation"]["seed"] + cell.seed
    rows = []
    with untouched_generators(seed):
        env = make_run_env(record, num_envs=episodes, seed=seed, device=torch.device("cpu"))
        for path in checkpoints or [None]:
            policy = RandomPolicy(env.full_action_spec) if path is None else policy_at(path, record, env.device)
            progress = {"iteration": 0, "frames": 0, "cpu_s": 0.0} if path is None else read_record(path)["progress"]
            env.set_seed(seed)
            returns = play_episodes(env, policy, max_steps=cfg.env.max_steps)["episode_return"].mean(-1)
            measured = {"evaluation_return": float(returns.mean()), "evaluation_std": float(returns.std())}
            where = {"task": cell.task, "algorithm": cell.algorithm, "seed": cell.seed}
            rows.append({**where, **{name: progress[name] for name in ("iteration", "frames", "cpu_s")}, **measured})
        env.close()
    return rows


@contextlib.contextmanager
def _output_to(file: Any) -> Iterator[None]:
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def run_all(plan: Mapping[str, Any], root: Path, workers: int) -> tuple[list[dict[str, Any]], list[Cell]]:
    """Runs what is not done yet, each run in one thread.

    Args:
        plan: what ``config/comparison.yaml`` says.
        root: where the runs go.
        workers: how many run at a time.

    Returns:
        The evaluations of all runs in the order of :func:`cells`, and the runs that failed.
    """
    todo = cells(plan)
    rows: dict[Cell, list[dict[str, Any]]] = {}
    failed = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool, tqdm(total=len(todo), unit="run") as bar:
        running = {pool.submit(run_cell, plan, cell, root): cell for cell in todo}
        for future in as_completed(running):
            cell = running[future]
            try:
                rows[cell] = future.result()
            except Exception:  # the others go on, and the failure is told at the end
                failed.append(cell)
                bar.write(f"{cell} failed:\n{traceback.format_exc()}")
            bar.update()
            if cell in rows:
                bar.set_postfix_str(f"{cell.task} {cell.algorithm} {rows[cell][-1]['evaluation_return']:.2f}")
    return [row for cell in todo if cell in rows for row in rows[cell]], failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: of the command line; None for those of the process.
    """
    plan: Any = OmegaConf.to_container(OmegaConf.load(CONFIG / "comparison.yaml"))
    parser = argparse.ArgumentParser(
        "python -m torchrl_trpo.recipes.comparison", description="Trains, evaluates and compares all algorithms."
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="where the runs go")
    parser.add_argument("--report", type=Path, default=Path("docs/results"), help="where tables and figures go")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--tasks", nargs="+", default=plan["tasks"], help="default: all of the plan")
    parser.add_argument("--algorithms", nargs="+", default=plan["algorithms"])
    parser.add_argument("--seeds", nargs="+", type=int, default=plan["seeds"])
    given = parser.parse_args(arguments)
    plan |= {"tasks": given.tasks, "algorithms": given.algorithms, "seeds": given.seeds}
    rows, failed = run_all(plan, given.output.absolute(), given.workers)
    given.report.mkdir(parents=True, exist_ok=True)
    with (given.report / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for path in write_report(given.report / "comparison.csv", given.report):
        print(f"  {path}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed, see output.txt in their folders: {failed}")


if __name__ == "__main__":
    main()
