"""Searches each algorithm's settings on each task with Hydra's multirun over a fixed space.

    python -m torchrl_trpo.recipes.studies.tuning

The space is in config/tuning.yaml. Run again after a stop, it repeats only the searches that were not complete. It
writes the trials to docs/results/tuning.csv and tuning.md, and each task's best to config/hyperparameters/finetuned.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from torchrl_trpo.config.overrides import written
from torchrl_trpo.errors import SettingError
from torchrl_trpo.recipes.studies.jobs import CONFIG, check_same, make_report_folder, run_all, study_parser
from torchrl_trpo.reporting.record import flat, read_json, read_rows, replace_file, write_rows

_OF_A_SEARCH = ("output.txt", "multirun.yaml", "summary.csv", "summary.md", "sweep.png")
"""The files in the folder of a search beside those of its trials, which are numbers."""


def trials(plan: Mapping[str, Any], algorithm: str) -> list[dict[str, Any]]:
    """Lists the settings to try, by name, in the order of Hydra's multirun."""
    space = plan["space"][algorithm]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def run_search(plan: Mapping[str, Any], root: Path, search: tuple[str, str]) -> list[dict[str, Any]]:
    """Runs the trials of an algorithm on a task, as ``<task>/<algorithm>/<number>``, unless all of them are done.

    It gives of each trial the ``task``, the ``algorithm``, its ``settings``, ``evaluation_return`` and ``cpu_s``.
    """
    task, algorithm = search
    tried, folder = trials(plan, algorithm), root / task / algorithm
    library = task.partition("/")[0]
    fixed = {**plan["settings"][library], "train.total_frames": plan["frames"][library], "seed": plan["seed"]}
    summaries = [folder / str(number) / "summary.json" for number in range(len(tried))]
    for path, settings in zip(summaries, tried, strict=True):
        if path.exists():
            now, before = flat(fixed | settings), OmegaConf.load(path.with_name("config.yaml"))
            check_same({name: OmegaConf.select(before, name) for name in now}, now, path.parent)
    if not all(path.exists() for path in summaries):
        sweep = [f"{name}={','.join(map(written, values))}" for name, values in plan["space"][algorithm].items()]
        overrides = [f"env={task}", *(f"{name}={value}" for name, value in fixed.items()), *sweep, "film=false"]
        command = [sys.executable, "-m", f"torchrl_trpo.recipes.{algorithm}", "-m", *overrides]
        others = [path.name for path in folder.glob("*") if not (path.name.isdecimal() or path.name in _OF_A_SEARCH)]
        if others:
            raise SettingError(f"{str(folder)!r} holds {others[0]!r}, which no search wrote. Legal: to move it away.")
        shutil.rmtree(folder, ignore_errors=True)  # Hydra begins a sweep anew
        folder.mkdir(parents=True)
        with (folder / "output.txt").open("w", encoding="utf-8") as output:
            subprocess.run(
                [*command, f"hydra.sweep.dir={written(str(folder))}"],
                check=True,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
    found = [read_json(path, "evaluation_return", "cpu_s") for path in summaries]
    return [
        {
            "task": task,
            "algorithm": algorithm,
            "settings": settings,
            # a summary has None for what is not finite
            **{name: math.nan if summary[name] is None else summary[name] for name in ("evaluation_return", "cpu_s")},
        }
        for settings, summary in zip(tried, found, strict=True)
    ]


def read_trials(data: Path) -> list[dict[str, Any]]:
    """Reads the trials that :func:`write_outcome` has written to ``tuning.csv``."""
    numbers = ("evaluation_return", "cpu_s")
    return [
        {**row, "settings": json.loads(row["settings"]), **{name: float(row[name]) for name in numbers}}
        for row in read_rows(data, "cpu_s", float)
    ]


def write_outcome(
    found: Sequence[Mapping[str, Any]], choose: Mapping[str, Any], report: Path, config: Path
) -> list[Path]:
    """Writes ``tuning.csv`` and ``tuning.md`` to ``report``, and the best settings to ``config``; gives the files.

    The best trial on each task, among those with the settings ``choose``, goes to ``<algorithm>/<task>.yaml``.
    """
    report.mkdir(parents=True, exist_ok=True)
    paths = [report / "tuning.csv", report / "tuning.md"]
    columns = ("task", "algorithm", "settings", "evaluation_return", "cpu_s")
    write_rows(paths[0], columns, ({**trial, "settings": json.dumps(trial["settings"])} for trial in found))
    best_trials = _best([trial for trial in found if choose.items() <= trial["settings"].items()])
    replace_file(paths[1], _table(found, best_trials, choose))
    for (algorithm, task), best in best_trials.items():
        paths.append(config / algorithm / f"{task}.yaml")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        settings = OmegaConf.create()
        for name, setting in best["settings"].items():
            OmegaConf.update(settings, name, setting)
        value = best["evaluation_return"]
        comment = f"# Of the trials with {_short(choose)} in docs/results/tuning.md the best: {value:.4g}."
        replace_file(paths[-1], f"# @package _global_\n{comment}\n{OmegaConf.to_yaml(settings)}")
    return paths


def _best(found: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for trial in found:
        cell, value = (trial["algorithm"], trial["task"]), trial["evaluation_return"]
        if math.isfinite(value) and (cell not in best or value > best[cell]["evaluation_return"]):
            best[cell] = trial
    return best


def _table(
    found: Sequence[Mapping[str, Any]],
    best: Mapping[tuple[str, str], Mapping[str, Any]],
    choose: Mapping[str, Any],
) -> str:
    """A table for each algorithm: a row for each task, a column for each trial, and the mean over the tasks."""
    tasks = list(dict.fromkeys(trial["task"] for trial in found))
    returns: dict[str, list[float]] = {task: [] for task in tasks}
    for trial in found:
        if math.isfinite(trial["evaluation_return"]):
            returns[trial["task"]].append(trial["evaluation_return"])
    hours = sum(trial["cpu_s"] for trial in found) / 3600
    lines = [
        "# The search for settings",
        "",
        "<!-- Written by make tuning -->",
        "",
        f"`make tuning` has run {len(found)} trials, in {hours:.1f} processor hours. Each algorithm has a table. A "
        "cell has the return of the deterministic policy at the end of a trial.",
        "",
        f"**Bold** is the trial that was taken: the best of those with `{_short(choose)}` "
        "([why](README.md#how-the-settings-were-chosen)).",
        "",
        "The last row sums a column up. On each task the worst trial of all algorithms is 0 and the best one is 1. The "
        "row has the mean over the tasks.",
    ]
    for algorithm in dict.fromkeys(trial["algorithm"] for trial in found):
        by_settings: dict[str, list[Mapping[str, Any]]] = {}
        for trial in found:
            if trial["algorithm"] == algorithm:
                by_settings.setdefault(_short(trial["settings"]), []).append(trial)
        lines += ["", f"| {algorithm} | {' | '.join(by_settings)} |", f"|---|{'---:|' * len(by_settings)}"]
        means = dict.fromkeys(by_settings, 0.0)
        for row, task in enumerate(tasks):
            texts = []
            for settings, trials in by_settings.items():
                value = trials[row]["evaluation_return"]
                low, high = min(returns[task], default=math.nan), max(returns[task], default=math.nan)
                means[settings] += (value - low) / ((high - low) or 1.0) / len(tasks)
                texts.append(f"**{value:.4g}**" if trials[row] is best.get((algorithm, task)) else f"{value:.4g}")
            lines.append(f"| `{task}` | {' | '.join(texts)} |")
        lines.append(f"| mean | {' | '.join(f'{mean:.2f}' for mean in means.values())} |")
    return "\n".join(lines) + "\n"


def _short(settings: Mapping[str, Any]) -> str:
    """Settings as text, their names without the sections."""
    return " ".join(
        _short(value) if isinstance(value, dict) else f"{name.rpartition('.')[2]}={value}"
        for name, value in settings.items()
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    plan: Any = OmegaConf.to_container(OmegaConf.load(CONFIG / "tuning.yaml"))
    parser = study_parser("tuning", "Searches settings.")
    parser.add_argument("--config", type=Path, default=CONFIG / "hyperparameters" / "finetuned")
    given = parser.parse_args(arguments)
    report = make_report_folder(parser, given.report or Path("docs/results"))
    if given.redraw:
        try:
            found = read_trials(report / "tuning.csv")
        except SettingError as error:
            parser.error(str(error))
        if not found:
            parser.error(f"--redraw: {report / 'tuning.csv'} has no rows.")
    else:
        job = functools.partial(run_search, plan, given.output.absolute())
        searches = list(itertools.product(plan["tasks"], plan["space"]))
        results = run_all(job, searches, workers=given.workers)
        found = [trial for each in results.values() for trial in each]
    for path in write_outcome(found, plan["choose"], report, given.config):
        print(f"  {path}")


if __name__ == "__main__":
    main()
