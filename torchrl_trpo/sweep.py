"""Sums up a Hydra sweep in one table and one plot; runs that differ only in their seed are one row.

python -m torchrl_trpo.recipes.hatrpo -m updater.max_kl=0.005,0.01,0.02 seed=0,1,2
python -m torchrl_trpo.sweep outputs/hatrpo/2026-01-31_12-00-00_sweep
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from torchrl_trpo.errors import SettingError
from torchrl_trpo.reporting.record import (
    RunRecord,
    find_runs,
    finite_mean,
    flat,
    mean,
    read_run,
    replace_file,
    write_rows,
)
from torchrl_trpo.reporting.style import ALGORITHM_COLORS, drawing

_OF_A_RUN = ("seed", "output_dir", "resume", "versions", "film", "checkpoint", "logger")
"""Settings that do not tell two settings of a sweep apart."""
_FIRST = ("algorithm", "env.name")
"""What a run is called by, if it differs; settings that follow from it, as MAPPO's ``clip_epsilon``, are left out."""


@dataclass(frozen=True)
class Setting:
    """The runs of one setting, which differ only in their seed.

    Attributes:
        values: the values that differ from those of other settings, by name.
        runs: the runs.
        missing: the number of runs that Hydra has not started yet.
    """

    values: Mapping[str, Any]
    runs: Sequence[RunRecord]
    missing: int = 0

    @property
    def name(self) -> str:
        """The values, as on the command line, after the algorithm and the task."""
        first = [str(self.values[name]) for name in _FIRST if name in self.values]
        others = [f"{name}={_plain(value)}" for name, value in self.values.items() if name not in _FIRST]
        return " ".join([*first, *others]) or "all runs"

    @property
    def finished(self) -> list[RunRecord]:
        """The runs that have finished."""
        return [run for run in self.runs if run.state == "finished"]

    def row(self) -> dict[str, Any]:
        """The setting's row of the summary, over the finished runs; NaN if there is none."""
        returns = [run.episode_return for run in self.finished if not math.isnan(run.episode_return)]
        row: dict[str, Any] = {name: _plain(value) for name, value in self.values.items()}
        row["runs"] = len(self.runs) + self.missing
        row["finished"] = len(self.finished)
        row["return_mean"] = mean(returns)
        row["return_min"] = min(returns, default=math.nan)
        row["return_max"] = max(returns, default=math.nan)
        row["cpu_s"] = finite_mean([run.column("cpu_s")[-1] for run in self.finished if run.frames])
        row["accepted"] = finite_mean([finite_mean(run.column("accepted")) for run in self.finished])
        row["kl_over_max_kl"] = finite_mean([finite_mean(r.column("kl")) / r.max_kl for r in self.finished if r.max_kl])
        return row


def read_sweep(folder: Path) -> list[Setting]:
    """Reads the runs of a sweep.

    Args:
        folder: the sweep's folder, or any folder with runs in it.

    Returns:
        The settings, in the order of their runs.

    Raises:
        SettingError: if there is no run in it.
    """
    records = [read_run(path) for path in find_runs(folder)]
    if not records:
        raise SettingError(f"folder: there is no run in {str(folder)!r}. Legal: the folder of a sweep.")
    flattened = [flat(record.config) for record in records]
    names = list(dict.fromkeys(name for settings in flattened for name in settings))
    first = [name for name in _FIRST if _differs(name, flattened)]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for settings in flattened:
        kinds.setdefault(_key([settings.get(name) for name in first]), []).append(settings)
    names = [name for name in names if name not in _FIRST and name.partition(".")[0] not in _OF_A_RUN]
    differ = [*first, *(name for name in names if any(_differs(name, runs) for runs in kinds.values()))]
    jobs = _jobs(folder)
    begun = {record.folder.name for record in records}
    lost = Counter(_without_seed(job) for number, job in jobs.items() if number not in begun)
    groups: dict[str, list[int]] = {}
    for index, settings in enumerate(flattened):
        groups.setdefault(_key([settings.get(name) for name in differ]), []).append(index)
    found = []
    for indices in groups.values():
        values = {name: flattened[indices[0]][name] for name in differ if name in flattened[indices[0]]}
        runs = [records[index] for index in indices]
        own = {_without_seed(jobs.get(run.folder.name, [])) for run in runs}
        found.append(Setting(values, runs, sum(lost.pop(job, 0) for job in own)))
    none_begun = [Setting(dict(each.split("=", 1) for each in job), [], count) for job, count in lost.items()]
    return [*found, *none_begun]


def summarize(settings: Sequence[Setting], folder: Path) -> list[Path]:
    """Writes ``summary.csv``, ``summary.md`` and ``sweep.png``.

    Args:
        settings: the settings of the sweep.
        folder: where they go.

    Returns:
        The paths.
    """
    rows = [setting.row() for setting in settings]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_rows(folder / "summary.csv", names, rows)
    lines = [" | ".join(_HEADINGS), "|".join("---" for _ in _HEADINGS)]
    lines += [" | ".join(_cells(setting)) for setting in settings]
    text = "".join(f"| {line} |\n" for line in lines)
    if unfinished := list(_unfinished(settings, folder)):
        text += "\nNot finished, and not in the numbers above:\n\n" + "".join(f"- {line}\n" for line in unfinished)
    replace_file(folder / "summary.md", text)
    return [folder / "summary.csv", folder / "summary.md", _plot(settings, folder / "sweep.png")]


_HEADINGS = ("setting", "finished", "return", "min", "max", "cpu_s", "accepted", "KL/max_kl")


def _cells(setting: Setting) -> Sequence[str]:
    row = setting.row()
    numbers = [("return_mean", ".2f"), ("return_min", ".2f"), ("return_max", ".2f"), ("cpu_s", ".0f")]
    numbers += [("accepted", ".2f"), ("kl_over_max_kl", ".2f")]
    shown = ["–" if math.isnan(row[name]) else format(row[name], form) for name, form in numbers]
    return [setting.name, f"{row['finished']} of {row['runs']}", *shown]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The rows in columns, the first one flush left and the others flush right."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def _unfinished(settings: Sequence[Setting], folder: Path) -> list[str]:
    """A line for each run that has not finished."""
    lines = []
    for setting in settings:
        for run in setting.runs:
            if run.state != "finished":
                reason = f" ({run.reason})" if run.reason else ""
                lines.append(
                    f"{run.folder.relative_to(folder)}: {setting.name}, seed {run.config['seed']}: {run.state}{reason} "
                    f"after {run.frames} of {run.total_frames} frames, return {run.episode_return:.2f}"
                )
        if setting.missing:
            lines.append(
                f"{setting.name}: {setting.missing} of {setting.missing + len(setting.runs)} runs have not begun"
            )
    return lines


def _plot(settings: Sequence[Setting], path: Path) -> Path:
    """Plots each setting's mean return and range over seeds, by task; a cross marks the end of an unfinished run."""
    kinds = [(str(s.values.get("algorithm", "")).lower(), s.values.get("env.name", "")) for s in settings]
    tasks = list(dict.fromkeys(task for _, task in kinds))
    colors: Any = ALGORITHM_COLORS if len({*kinds}) == len(kinds) else {}
    size = (4 + 6 * len(tasks), 5 + 0.35 * len(settings))
    with drawing(path, 1, len(tasks), size) as (figure, axes):
        figure.set_layout_engine("constrained")
        for index, (setting, (algorithm, task)) in enumerate(zip(settings, kinds, strict=True)):
            axis, color = axes[tasks.index(task)], colors.get(algorithm, f"C{index}")
            by_frames: dict[float, list[float]] = {}
            for run in setting.runs:
                for frames, value in zip(run.column("frames"), run.column("episode_return"), strict=True):
                    by_frames.setdefault(frames, []).append(value)
                if run.state != "finished" and run.frames:
                    axis.plot(run.frames / 1000, run.column("episode_return")[-1], "x", color=color, ms=9)
            curve = [(f / 1000, [v for v in values if math.isfinite(v)]) for f, values in sorted(by_frames.items())]
            curve = [(frames, values) for frames, values in curve if values]
            at = [frames for frames, _ in curve]
            seeds = f"{len(setting.finished)} of {len(setting.runs) + setting.missing} runs finished"
            label = fill(f"{setting.name} ({seeds})", 100)
            axis.plot(at, [finite_mean(v) for _, v in curve], color=color, label=label)
            lows, highs = [min(values) for _, values in curve], [max(values) for _, values in curve]
            axis.fill_between(at, lows, highs, color=color, alpha=0.2, lw=0)
        for axis, task in zip(axes, tasks, strict=True):
            axis.set(title=task or "Mean and range over seeds", xlabel="thousand frames")
        axes[0].set_ylabel("episode return, mean over agents")
        figure.legend(loc="outside lower center")
    return path


def _jobs(folder: Path) -> dict[str, list[str]]:
    """The swept overrides of each job, by the name of its folder, in the order in which Hydra numbers jobs."""
    if not (folder / "multirun.yaml").exists():
        return {}
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    try:
        task = list(OmegaConf.load(folder / "multirun.yaml").hydra.overrides.task)
        parsed = OverridesParser.create().parse_overrides(task)
    except Exception as error:  # of YAML, of OmegaConf, of Hydra, or of the file
        raise SettingError(
            f"folder: {folder / 'multirun.yaml'} cannot be read ({str(error).splitlines()[0]}). Legal: the file that "
            "Hydra wrote, or none."
        ) from error
    swept = [override for override in parsed if override.is_sweep_override()]
    choices = [[f"{each.key_or_group}={value}" for value in each.sweep_string_iterator()] for each in swept]
    return {str(number): list(job) for number, job in enumerate(itertools.product(*choices))}


def _without_seed(job: Sequence[str]) -> tuple[str, ...]:
    return tuple(override for override in job if not override.startswith("seed="))


def _differs(name: str, runs: Sequence[Mapping[str, Any]]) -> bool:
    return len({_key(settings.get(name)) for settings in runs}) > 1


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool | list) or value is None else value


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m torchrl_trpo.sweep", description="Sums up the runs of a Hydra sweep in a table and a plot."
    )
    parser.add_argument("folder", type=Path, help="the sweep's folder, or any folder with runs in it")
    folder = parser.parse_args(arguments).folder
    try:
        settings = read_sweep(folder)
    except SettingError as error:
        sys.exit(f"error: {error}")
    paths = summarize(settings, folder)
    print(_table([_HEADINGS, *(_cells(setting) for setting in settings)]))
    for line in _unfinished(settings, folder):
        print(f"not finished: {line}")
    for path in paths:
        print(f"  {path}")


if __name__ == "__main__":
    main()
