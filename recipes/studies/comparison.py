"""Trains all algorithms on all tasks with several seeds, evaluates them, and compares them.

    python -m torchrl_trpo.recipes.studies.comparison
    python -m torchrl_trpo.recipes.studies.comparison --tasks vmas/balance --seeds 0 1 --report outputs/report
    python -m torchrl_trpo.recipes.studies.comparison --plan differing_agents

It runs config/comparison.yaml, or another plan, or a part of it. Run again after a stop, it continues. The report is
comparison.csv, a row for each evaluation, comparison.md and the figures; that of another plan has its name. The table
keeps the rows of runs that are not run again, so that a long plan can be run part by part, also on several machines.
Rows that were made with other settings than the plan has now are refused.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchrl.envs.utils import RandomPolicy

from torchrl_trpo.errors import SettingError
from torchrl_trpo.recipes.studies.jobs import (
    CONFIG,
    check_same,
    config,
    make_report_folder,
    run_all,
    study_parser,
    train,
)
from torchrl_trpo.recipes.studies.report import write_report
from torchrl_trpo.reporting.record import read_json, read_rows, replace_file, write_rows
from torchrl_trpo.seeding import untouched_generators
from torchrl_trpo.training.checkpoints import read_record
from torchrl_trpo.training.episodes import play_episodes
from torchrl_trpo.training.film import film_run
from torchrl_trpo.training.policy import find_run, make_run_env, policy_at

PLANS = ("comparison", "team_budget", "differing_agents", "at_scale", "at_scale_search")
"""The plans that can be run."""
COLUMNS = (
    *("task", "algorithm", "seed", "iteration", "frames", "cpu_s"),
    *("evaluation_return", "evaluation_std", "episode_return", "settings"),
)
"""The columns of ``comparison.csv``.

``episode_return`` is that of training, whose policy explores. ``settings`` tells the plan's settings from others.
"""


@dataclass(frozen=True)
class Cell:
    """One training run of the comparison; the algorithm ``random`` is not trained.

    An algorithm is a recipe, or a variant of one: ``hatrpo-team`` is ``hatrpo`` with the plan's settings for ``team``.
    """

    task: str
    algorithm: str
    seed: int

    def folder(self, root: Path) -> Path:
        """The folder of the run within that of the comparison."""
        return root / self.task / self.algorithm / f"seed-{self.seed}"


def cells(plan: Mapping[str, Any]) -> list[Cell]:
    """Lists the runs, one seed of everything before the next seed: stopped early, it is a comparison of fewer seeds."""
    algorithms = [*plan["algorithms"], "random"]
    return [Cell(task, name, seed) for seed in plan["seeds"] for task in plan["tasks"] for name in algorithms]


def settings_of(plan: Mapping[str, Any], cell: Cell) -> tuple[str, dict[str, Any]]:
    """The recipe that trains a cell, and its settings: the plan's for library, task, recipe and variant, in this order.

    Later ones override earlier ones. Random actions need no recipe of their own.
    """
    recipe, _, variant = cell.algorithm.partition("-")
    library = cell.task.partition("/")[0]
    settings = {"env": cell.task, "seed": cell.seed}
    for part in (library, cell.task, recipe, variant):
        settings |= plan["settings"].get(part, {})
    return "hatrpo" if recipe == "random" else recipe, settings


def digest_of(plan: Mapping[str, Any], cell: Cell) -> str:
    """Eight digits for what the plan sets for a cell and for its evaluation."""
    text = json.dumps([settings_of(plan, cell), plan["evaluation"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_cell(plan: Mapping[str, Any], root: Path, cell: Cell) -> list[dict[str, Any]]:
    """Trains and evaluates a run, or continues it; gives its evaluations, each with the entries :data:`COLUMNS`."""
    recipe, settings = settings_of(plan, cell)
    iterations = settings["train.total_frames"] // settings["train.frames_per_batch"]
    every = max(1, iterations // plan["evaluation"]["points"])
    settings |= {"checkpoint.every": every, "checkpoint.keep": iterations}
    folder = cell.folder(root)
    cfg = config(recipe, [f"{name}={value}" for name, value in settings.items()], folder)
    now: Any = OmegaConf.to_container(cfg, resolve=True)
    episodes = plan["evaluation"]["episodes"][cell.task.partition("/")[0]]
    played = {"seed": plan["evaluation"]["seed"] + cell.seed, "episodes": episodes}
    now["evaluation"] = played
    done = folder / "comparison.json"
    if done.exists():
        before = read_json(done, "settings", "rows")
        check_same(before["settings"], now, folder)
        return _completed(before["rows"], folder, digest_of(plan, cell))
    folder.mkdir(parents=True, exist_ok=True)
    points: list[Path | None] = [None]
    if cell.algorithm != "random":
        train(recipe, cfg)
        found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoints/checkpoint-*")}
        wanted = [*range(every, iterations, every), iterations]
        if lost := [iteration for iteration in wanted if iteration not in found]:
            raise SettingError(
                f"{str(folder)!r} has no checkpoints of the iterations {lost}. Legal: to delete it, or another output "
                "folder."
            )
        points = [found[iteration] for iteration in wanted]
    where = {"task": cell.task, "algorithm": cell.algorithm, "seed": cell.seed}
    rows = [where | measured for measured in _evaluate(cfg, points, **played)]
    replace_file(done, json.dumps({"settings": now, "rows": rows}))
    return _completed(rows, folder, digest_of(plan, cell))


def _completed(rows: Sequence[Mapping[str, Any]], folder: Path, digest: str) -> list[dict[str, Any]]:
    """The evaluations of a run, each with the return of the iteration that it comes after, and the settings' digest."""
    returns = {row["iteration"]: row["episode_return"] for row in read_rows(folder / "metrics.csv")}
    return [
        {**row, "episode_return": float(returns.get(str(row["iteration"])) or "nan"), "settings": digest}
        for row in rows
    ]


def _evaluate(
    cfg: DictConfig, checkpoints: Sequence[Path | None], *, episodes: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields the progress at each checkpoint, and the returns of its deterministic policy in the same episodes.

    None in place of a checkpoint stands for random actions.
    """
    record: Any = OmegaConf.to_container(cfg, resolve=True)
    with untouched_generators(seed):
        env = make_run_env(record, num_envs=episodes, seed=seed, device=torch.device("cpu"))
        for path in checkpoints:
            policy = RandomPolicy(env.full_action_spec) if path is None else policy_at(path, record, env.device)
            progress = {"iteration": 0, "frames": 0, "cpu_s": 0.0} if path is None else read_record(path)["progress"]
            env.set_seed(seed)
            returns = play_episodes(env, policy, max_steps=cfg.env.max_steps)["episode_return"].mean(-1)
            measured = {"evaluation_return": float(returns.mean()), "evaluation_std": float(returns.std())}
            yield {name: progress[name] for name in ("iteration", "frames", "cpu_s")} | measured
        env.close()


def _rows_by_cell(data: Path) -> dict[Cell, list[dict[str, Any]]]:
    """The rows of a table, by the run that each is of."""
    rows: dict[Cell, list[dict[str, Any]]] = {}
    for row in read_rows(data):
        rows.setdefault(Cell(row["task"], row["algorithm"], int(row["seed"])), []).append(row)
    return rows


def film_cell(plan: Mapping[str, Any], root: Path, folder: Path, cell: Cell) -> Path | None:
    """Films an episode of a run's last policy as ``<task>-<algorithm>.gif``, small enough for a page with many."""
    checkpoint, settings = find_run(cell.folder(root))
    cpu = torch.device("cpu")
    path = folder / f"{cell.task.rpartition('/')[2]}-{cell.algorithm}.gif"
    seed = plan["evaluation"]["seed"] + cell.seed
    with untouched_generators(seed):
        policy = policy_at(checkpoint, settings, cpu)
        return film_run(settings, policy, path, seed=seed, device=cpu, episodes=1, shrink=3, every=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = study_parser("comparison", "Trains, evaluates and compares all algorithms.")
    plan_parser = ArgumentParser(add_help=False)  # the other options depend on the plan
    for each in (plan_parser, parser):
        each.add_argument("--plan", choices=PLANS, default=PLANS[0], help="what is run: config/<plan>.yaml")
    chosen_plan = plan_parser.parse_known_args(arguments)[0].plan
    parser.set_defaults(output=Path("outputs") / chosen_plan)
    plan: Any = OmegaConf.to_container(OmegaConf.load(CONFIG / f"{chosen_plan}.yaml"))
    for name in ("tasks", "algorithms"):
        parser.add_argument(f"--{name}", nargs="+", choices=plan[name], default=plan[name], metavar=name.upper())
    parser.add_argument("--seeds", nargs="+", type=int, default=plan["seeds"])
    parser.add_argument("--films", type=Path, help="a folder for films of the first seed's trained policies")
    given = parser.parse_args(arguments)
    part = {name: getattr(given, name) for name in ("tasks", "algorithms", "seeds")}
    whole = all(set(chosen) >= set(plan[name]) for name, chosen in part.items())
    plan |= part
    if wrong := [seed for seed in given.seeds if not 0 <= seed < 2**32 - plan["evaluation"]["seed"]]:
        parser.error(f"--seeds: {wrong[0]}. Legal: from 0 to {2**32 - 1 - plan['evaluation']['seed']}.")
    report = make_report_folder(parser, given.report or (Path("docs/results") if whole else given.output))
    data = report / f"{chosen_plan}.csv"
    try:
        table = _rows_by_cell(data)
    except SettingError as error:
        parser.error(str(error))
    kept = table.keys() - (set() if given.redraw else set(cells(plan)))
    others = {each for each in kept if {row.get("settings") for row in table[each]} != {digest_of(plan, each)}}
    if others:
        parser.error(
            f"{data} has {len(others)} runs with other settings than config/{chosen_plan}.yaml has now, among them "
            f"{min(others, key=str)}. Legal: to run them again, to delete their rows, or another --report."
        )
    if not given.redraw:
        job = functools.partial(run_cell, plan, given.output.absolute())
        table |= run_all(job, cells(plan), workers=given.workers)
        write_rows(data, COLUMNS, itertools.chain.from_iterable(table.values()))
    rows = [row for cell in cells(plan) for row in table.get(cell, ())]
    if not rows:
        parser.error(f"--redraw: {data} has none of these runs.")
    paths: list[Path | None] = [data, *write_report(rows, chosen_plan, report)]
    if given.films:
        given.films.mkdir(parents=True, exist_ok=True)
        film = functools.partial(film_cell, plan, given.output, given.films)
        first = cells(plan | {"seeds": given.seeds[:1]})
        paths += [film(cell) for cell in first if cell.algorithm != "random"]
    for path in filter(None, paths):
        print(f"  {path}")


if __name__ == "__main__":
    main()
