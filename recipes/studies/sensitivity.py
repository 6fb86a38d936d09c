"""Measures what each setting of the trust region does, one at a time.

    python -m torchrl_trpo.recipes.studies.sensitivity

It runs the sweeps of config/sensitivity.yaml, or some of them. Run again after a stop, it continues. The report is
sensitivity.csv, a row for each run, and a figure for each sweep.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from torchrl_trpo.errors import SettingError
from torchrl_trpo.recipes.studies.jobs import CONFIG, config, make_report_folder, run_all, study_parser, train
from torchrl_trpo.reporting.record import read_json, read_rows, read_run, write_rows
from torchrl_trpo.reporting.style import ALGORITHM_COLORS, REFERENCE, drawing

MEASURED = ("evaluation_return", "cpu_s", "accepted", "kl_ratio", "explained_variance")
"""The results of a run: the deterministic policy's return at the end, the processor seconds, and means over the second
half of the iterations: the share of accepted steps, the KL divergence divided by ``max_kl``, the explained variance."""


_UNITS = {
    "updater.max_kl": " [nats]",
    "updater.fisher_subsample": " [share of rows]",
    "updater.accept_ratio": " [share of the promise]",
}


@dataclass(frozen=True)
class Trial:
    """One run: what is changed from the defaults, as ``(name, value)``."""

    task: str
    changed: tuple[tuple[str, float], ...]
    seed: int


def trials(plan: Mapping[str, Any]) -> list[Trial]:
    """Lists all runs, each once even if several sweeps have it; one seed of everything comes before the next seed."""
    defaults = _defaults(plan)
    found: dict[Trial, None] = {}
    for seed, task in itertools.product(plan["seeds"], plan["tasks"]):
        for space in plan["sweeps"].values():
            for values in itertools.product(*space.values()):
                settings = dict(zip(space, values, strict=True))
                found[Trial(task, _changed(settings, defaults), seed)] = None
    return list(found)


def _defaults(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The default values of the settings that are swept."""
    settings = [f"{name}={value}" for name, value in plan["settings"].items()]
    cfg = config(plan["recipe"], [f"env={plan['tasks'][0]}", *settings], Path("defaults"))
    names = {name for space in plan["sweeps"].values() for name in space}
    return {name: OmegaConf.select(cfg, name) for name in names}


def _changed(settings: Mapping[str, float], defaults: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple((name, value) for name, value in settings.items() if value != defaults[name])


def run_trial(plan: Mapping[str, Any], root: Path, trial: Trial) -> dict[str, float]:
    """Trains, unless the run is done, and reads its results, by the names in :data:`MEASURED`."""
    settings = {**plan["settings"], **dict(trial.changed), "seed": trial.seed}
    name = ",".join(f"{name}={value}" for name, value in trial.changed) or "defaults"
    folder = root / trial.task / name / f"seed-{trial.seed}"
    overrides = [f"env={trial.task}", *(f"{name}={value}" for name, value in settings.items())]
    cfg = config(plan["recipe"], overrides, folder)
    train(plan["recipe"], cfg)
    summary = read_json(folder / "summary.json", "evaluation_return", "cpu_s")
    run = read_run(folder)
    half = -(-len(run.column("iteration")) // 2)
    return {
        "evaluation_return": summary["evaluation_return"],
        "cpu_s": summary["cpu_s"],
        "accepted": run.recent("accepted", half),
        "kl_ratio": run.recent("kl", half) / cfg.updater.max_kl,
        "explained_variance": run.recent("explained_variance", half),
    }


def write_report(plan: Mapping[str, Any], measured: Mapping[Trial, Mapping[str, float]], folder: Path) -> list[Path]:
    """Writes the data, and a figure for each sweep; gives the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "sensitivity.csv"]
    rows = (
        {"task": trial.task, "changed": json.dumps(dict(trial.changed)), "seed": trial.seed, **values}
        for trial, values in measured.items()
    )
    write_rows(paths[0], ("task", "changed", "seed", *MEASURED), rows)
    defaults = _defaults(plan)
    for name, space in plan["sweeps"].items():
        paths.append(folder / f"sensitivity_{name}.png")
        _plot(plan, space, defaults, measured, paths[-1])
    return paths


def read_measured(data: Path) -> dict[Trial, dict[str, float]]:
    """Reads the results that :func:`write_report` has written to ``sensitivity.csv``; none if there is no such file."""
    return {
        Trial(row["task"], tuple(json.loads(row["changed"]).items()), int(row["seed"])): {
            name: float(row[name] or "nan") for name in MEASURED
        }
        for row in read_rows(data, "seed")
    }


def _plot(
    plan: Mapping[str, Any],
    space: Mapping[str, Sequence[float]],
    defaults: Mapping[str, float],
    measured: Mapping[Trial, Mapping[str, float]],
    path: Path,
) -> None:
    """The return on each task over a setting, then its processor seconds: means and ranges over seeds.

    The y axes are the same in the figures of all sweeps, so that noise looks small.
    """
    (name, values), *others = space.items()
    curves = [{second: each} for second, choices in others for each in choices] or [{}]
    panels = [*((task, "evaluation_return") for task in plan["tasks"]), (plan["tasks"][0], "cpu_s")]
    color = ALGORITHM_COLORS[plan["recipe"]]
    with drawing(path, 1, len(panels), (4.2 * len(panels), 3.6)) as (figure, axes):
        figure.set_layout_engine("constrained")
        for axis, (task, column) in zip(axes, panels, strict=True):
            for shift, (curve, style) in enumerate(zip(curves, itertools.cycle(("o-", "s--", "^:")))):
                points = []
                for value in values:
                    changed = _changed({name: value, **curve}, defaults)
                    runs = [measured.get(Trial(task, changed, seed)) for seed in plan["seeds"]]
                    points.append([run[column] for run in runs if run is not None] or [math.nan])
                label = ", ".join(f"{key.rpartition('.')[2]} {each:,}" for key, each in curve.items())
                means = [sum(each) / len(each) for each in points]
                below = [mean - min(each) for mean, each in zip(means, points, strict=True)]
                above = [max(each) - mean for mean, each in zip(means, points, strict=True)]
                at = [position + 0.07 * (shift - (len(curves) - 1) / 2) for position in range(len(values))]
                axis.errorbar(at, means, [below, above], fmt=style, color=color, elinewidth=1.2, capsize=3, label=label)
            axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            if defaults[name] in values:
                axis.axvline(values.index(defaults[name]), **REFERENCE)
            quantity = "episode return" if column == "evaluation_return" else "processor seconds of a run"
            axis.set(
                title=task.partition("/")[2], xlabel=name.rpartition(".")[2] + _UNITS.get(name, ""), ylabel=quantity
            )
            everywhere = [run[column] for trial, run in measured.items() if trial.task == task]
            low, high = 0.0 if column == "cpu_s" else min(everywhere), max(everywhere)
            margin = 0.05 * (high - low) or 0.05
            axis.set_ylim(0.0 if column == "cpu_s" else low - margin, high + margin)
            if others and axis is axes[0]:
                axis.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    plan: Any = OmegaConf.to_container(OmegaConf.load(CONFIG / "sensitivity.yaml"))
    parser = study_parser("sensitivity", "Measures what each setting does.")
    parser.add_argument("--sweeps", nargs="+", choices=plan["sweeps"], default=list(plan["sweeps"]))
    given = parser.parse_args(arguments)
    whole = set(given.sweeps) == set(plan["sweeps"])
    plan["sweeps"] = {name: plan["sweeps"][name] for name in given.sweeps}
    report = make_report_folder(parser, given.report or (Path("docs/results") if whole else given.output))
    job = functools.partial(run_trial, plan, given.output.absolute())
    try:
        measured = read_measured(report / "sensitivity.csv")  # rows of trials that are not run again are kept
    except SettingError as error:
        parser.error(str(error))
    if not given.redraw:
        measured |= run_all(job, trials(plan), workers=given.workers)
    if not measured:
        parser.error(f"--redraw: {report / 'sensitivity.csv'} has no rows.")
    for path in write_report(plan, measured, report):
        print(f"  {path}")


if __name__ == "__main__":
    main()
