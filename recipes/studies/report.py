"""The tables and figures of a comparison, from its evaluations."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from torchrl_trpo.numerics.statistics import percentile_bootstrap
from torchrl_trpo.recipes.studies.statistics import (
    RESAMPLES,
    aggregate,
    interquartile_mean,
    probability_of_improvement,
)

NAMES = {"itrpo": "ITRPO", "matrpo": "MATRPO", "hatrpo": "HATRPO", "mappo": "MAPPO", "ippo": "IPPO"}
COLORS = {
    "hatrpo": "tab:red",
    "matrpo": "tab:orange",
    "itrpo": "tab:purple",
    "mappo": "tab:blue",
    "ippo": "tab:cyan",
}


def display_name(algorithm: str) -> str:
    """The name of an algorithm or of a variant, such as ``hatrpo-team``, in tables and figures."""
    recipe, _, variant = algorithm.partition("-")
    return f"{NAMES[recipe]} {variant}".strip()


def _color(algorithm: str) -> str | None:
    return COLORS.get(algorithm.partition("-")[0])


def _style(algorithm: str) -> str:
    return "--" if "-" in algorithm else "-"


@dataclass(frozen=True)
class Curves:
    """The evaluations of one algorithm on one task."""

    frames: Tensor  # the environment steps at each evaluation, [n_points]
    cpu_s: Tensor  # the processor seconds of training until then, [n_runs, n_points]
    returns: Tensor  # [n_runs, n_points]
    stds: Tensor  # the standard deviations of the returns within an evaluation, [n_runs, n_points]

    def at_cpu(self, seconds: float) -> Tensor:
        """The return of each run at a number of processor seconds, ``[n_runs]``, linear between two evaluations.

        It is the last one if the run had ended, NaN if it had no evaluation yet.
        """
        points = zip(self.cpu_s.numpy(), self.returns.numpy(), strict=True)
        return torch.tensor([np.interp(seconds, *run, left=np.nan) for run in points], dtype=torch.float64)


class Comparison:
    """The evaluations of all algorithms on all tasks, for the seeds that every algorithm has on every task.

    ``rows`` are those of ``comparison.csv``. It raises ValueError if no seed is complete, or a return is not finite.

    ``random`` has the random policy's mean return by task. ``learned`` has the tasks on which each run of some
    algorithm ends above all evaluations of the random policy, by at least half of the standard deviation of its own
    episodes (an effect that is not small, Cohen 1988). On the others a score would compare noise with noise.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        runs: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
        for row in rows:
            if not math.isfinite(float(row["evaluation_return"])):
                raise ValueError(f"the evaluation_return of {dict(row)} is not finite.")
            runs.setdefault((row["task"], row["algorithm"], int(row["seed"])), []).append(row)
        self.tasks = list(dict.fromkeys(task for task, _, _ in runs))
        self.algorithms = [name for name in dict.fromkeys(name for _, name, _ in runs) if name != "random"]
        cells = list(itertools.product(self.tasks, [*self.algorithms, "random"]))
        seeds = sorted({seed for _, _, seed in runs})
        self.seeds = [seed for seed in seeds if all((*cell, seed) in runs for cell in cells)]
        if not self.seeds:
            missing = [(*cell, seed) for seed in seeds for cell in cells if (*cell, seed) not in runs]
            raise ValueError(f"no seed has all algorithms on all tasks; the first that are missing: {missing[:5]}.")
        self.curves = {cell: self._curves([runs[(*cell, seed)] for seed in self.seeds]) for cell in cells}
        self.random = {task: float(self.curves[task, "random"].returns.mean()) for task in self.tasks}
        self.learned = [task for task in self.tasks if any(self._learns(name, task) for name in self.algorithms)]

    @staticmethod
    def _curves(runs: Sequence[Sequence[Mapping[str, Any]]]) -> Curves:
        columns = {
            name: torch.tensor([[float(row[name]) for row in run] for run in runs], dtype=torch.float64)
            for name in ("frames", "cpu_s", "evaluation_return", "evaluation_std")
        }
        frames, *others = columns.values()
        return Curves(frames[0], *others)

    def _learns(self, algorithm: str, task: str) -> bool:
        gain = self.final(task, algorithm) - self.final(task, "random").max()
        return bool(((gain > 0) & (gain >= 0.5 * self.curves[task, algorithm].stds[:, -1])).all())

    def final(self, task: str, algorithm: str) -> Tensor:
        """The last evaluation's returns, ``[n_seeds]``."""
        return self.curves[task, algorithm].returns[:, -1]

    def cpu_budget(self, task: str) -> float:
        """The processor seconds that the task's cheapest algorithm takes for all its frames, mean over seeds."""
        return min(float(self.curves[task, name].cpu_s[:, -1].mean()) for name in self.algorithms)

    def scores(self, algorithm: str, *, equal_cpu: bool = False) -> Tensor:
        """Normalised returns: 0 is a random policy, 1 the best algorithm's mean over seeds at equal frames.

        They are ``[n_tasks_learned, n_seeds]``, with ``equal_cpu`` at :meth:`cpu_budget`, else at the end of the runs.
        A run that has no evaluation yet has 0.
        """
        scores = []
        for task in self.learned:
            best = max(float(self.final(task, name).mean()) for name in self.algorithms)
            curves = self.curves[task, algorithm]
            returns = curves.at_cpu(self.cpu_budget(task)) if equal_cpu else curves.returns[:, -1]
            score = (returns - self.random[task]) / (best - self.random[task])
            scores.append(score.where(~returns.isnan(), 0.0))
        return torch.stack(scores)


def write_report(data: Path, folder: Path) -> list[Path]:
    """Writes ``comparison.md`` and the figures from ``comparison.csv``; gives the paths of all of them.

    Those of another plan have its name.
    """
    plan = data.stem
    with data.open(newline="") as file:
        comparison = Comparison(list(csv.DictReader(file)))
    paths = [data, folder / f"{plan}.md"]
    paths[1].write_text(_tables(comparison, plan))
    for name, x, label in (("frames", "frames", "thousand frames"), ("cpu", "cpu_s", "processor seconds")):
        paths.append(folder / f"{plan}_{name}.png")
        _plot_curves(comparison, x, label, paths[-1])
    if comparison.learned:
        paths.append(folder / f"{plan}_scores.png")
        _plot_scores(comparison, paths[-1])
    return paths


def _tables(comparison: Comparison, plan: str) -> str:
    names = comparison.algorithms
    seeds = comparison.seeds
    head = f"| | {' | '.join(display_name(name) for name in names)} |"
    rule = f"|---|{'---|' * len(names)}"
    frames = {task: int(comparison.curves[task, names[0]].frames[-1]) for task in comparison.tasks}
    hours = sum(float(comparison.curves[task, name].cpu_s[:, -1].sum()) for task in frames for name in names) / 3600
    lines = [
        f"# {'The comparison' if plan == 'comparison' else plan.capitalize().replace('_', ' ')} in numbers",
        "",
        f"<!-- Written by python -m torchrl_trpo.recipes.studies.comparison --plan {plan} -->",
        "",
        f"Seeds {', '.join(map(str, seeds))} of each algorithm on each task; {hours:.1f} processor hours of training.",
        "",
        "Return of the deterministic policy at the end, mean over seeds [smallest, largest]; **bold**: the highest "
        "mean, and those whose 95 % interval of the difference to it (bootstrap over seeds) holds 0.",
        "",
        head.replace("| |", "| task | frames | random |", 1),
        rule.replace("|---|", "|---|---|---|", 1),
    ]
    for task in comparison.tasks:
        finals = {name: comparison.final(task, name) for name in names}
        best = max(finals.values(), key=lambda values: float(values.mean()))
        digits = "z.1f" if best.abs().max() >= 10 else "z.2f"
        texts = [format(comparison.random[task], digits)]
        for values in finals.values():
            text = "{:{d}} [{:{d}}, {:{d}}]".format(*map(float, (values.mean(), values.min(), values.max())), d=digits)
            texts.append(f"**{text}**" if values is best or _may_equal(values, best) else text)
        lines.append(f"| `{task}` | {frames[task]:,} | {' | '.join(texts)} |")
    lines += ["", "Processor seconds of a run, mean over seeds:", "", head.replace("| |", "| task |", 1), rule]
    for task in comparison.tasks:
        texts = [f"{comparison.curves[task, name].cpu_s[:, -1].mean():.0f}" for name in names]
        lines.append(f"| `{task}` | {' | '.join(texts)} |")
    lines += ["", "Mean over seeds and its 95 % interval (bootstrap over seeds):", ""]
    lines += [f"![Returns over frames]({plan}_frames.png)", "", f"![Returns over time]({plan}_cpu.png)"]
    if not comparison.learned:
        return "\n".join([*lines, "", "No algorithm learned any task in these frames."]) + "\n"
    left_out = [f"`{task}`" for task in comparison.tasks if task not in comparison.learned]
    without = f" without {', '.join(left_out)}, which no algorithm learned in these frames" if left_out else ""
    lines += [
        "",
        f"Scores over all tasks{without}. 0 is a random policy, 1 the best algorithm's mean at equal frames, which",
        "the bootstrap holds fixed. Equal processor seconds are those that a task's cheapest algorithm takes for all",
        "frames; a run that has not been evaluated until then has 0. Intervals of 95 %, from resampled seeds:",
        "",
    ]
    lines += [head.replace("| |", "| score |", 1), rule]
    budgets = (("equal frames", False), ("equal processor seconds", True))
    for title, equal_cpu in budgets:
        for statistic, function in (("interquartile mean", interquartile_mean), ("mean", _mean)):
            scores = [aggregate(comparison.scores(name, equal_cpu=equal_cpu), function) for name in names]
            lines.append(f"| {statistic}, {title} | {' | '.join(map(_value_with_interval, scores))} |")
    for other in [name for name in ("mappo", "ippo") if name in names]:
        for title, equal_cpu in budgets:
            chances = [_improvement(comparison, name, other, equal_cpu) for name in names]
            lines.append(
                f"| P(better than {display_name(other)}), {title} | {' | '.join(map(_value_with_interval, chances))} |"
            )
    lines += ["", f"![Aggregate scores]({plan}_scores.png)"]
    return "\n".join(lines) + "\n"


def _mean(values: Tensor) -> Tensor:
    return values.mean(-1)


def _improvement(comparison: Comparison, name: str, other: str, equal_cpu: bool) -> tuple[float, float, float] | None:
    if name == other:
        return None
    own, others = (comparison.scores(each, equal_cpu=equal_cpu) for each in (name, other))
    return probability_of_improvement(own, others)


def _may_equal(values: Tensor, best: Tensor) -> bool:
    """Whether the 95 % interval of the difference between two algorithms' means reaches 0."""
    _, high = percentile_bootstrap(lambda own, other: own.mean(-1) - other.mean(-1), values, best, resamples=RESAMPLES)
    return high >= 0


def _value_with_interval(value: tuple[float, float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def _plot_curves(comparison: Comparison, x: str, label: str, path: Path) -> None:
    """One axis for each task: the mean over seeds and its 95 % bootstrap interval."""
    columns = min(4, len(comparison.tasks))
    rows = -(-len(comparison.tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, task in zip(axes, comparison.tasks, strict=False):
        for name in comparison.algorithms:
            curves = comparison.curves[task, name]
            positions = curves.frames / 1000 if x == "frames" else curves.cpu_s.mean(0)
            bands = [aggregate(point.unsqueeze(0), _mean) for point in curves.returns.unbind(1)]
            mean, low, high = zip(*bands, strict=True)
            axis.plot(positions, mean, color=_color(name), ls=_style(name), label=display_name(name), lw=1.6)
            axis.fill_between(positions, low, high, color=_color(name), alpha=0.15, lw=0)
        axis.axhline(comparison.random[task], color="gray", ls=":", lw=1, label="random")
        axis.set_title(task.partition("/")[2], fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    for axis in axes[len(comparison.tasks) :]:
        axis.remove()
    figure.supxlabel(label)
    figure.supylabel("episode return, deterministic")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)


def _plot_scores(comparison: Comparison, path: Path) -> None:
    """Aggregate scores, and the probability that an algorithm is better than MAPPO, with 95 % intervals."""
    figure = Figure(figsize=(12, 0.45 * len(comparison.algorithms) + 1.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    titles = ("IQM score, equal frames", "IQM score, equal processor seconds", "P(better than MAPPO), equal frames")
    for position, name in enumerate(reversed(comparison.algorithms)):
        values = [
            aggregate(comparison.scores(name)),
            aggregate(comparison.scores(name, equal_cpu=True)),
            _improvement(comparison, name, "mappo", False) if "mappo" in comparison.algorithms else None,
        ]
        for axis, value in zip(axes, values, strict=True):
            if value is not None:
                axis.barh(position, value[2] - value[1], left=value[1], height=0.6, color=_color(name), alpha=0.4)
                axis.plot([value[0], value[0]], [position - 0.3, position + 0.3], color="black", lw=2)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.use_sticky_edges = False  # which would leave the bars no margin
        axis.autoscale_view()
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(
        range(len(comparison.algorithms)), [display_name(name) for name in reversed(comparison.algorithms)]
    )
    axes[0].set_xlabel("0: random policy, 1: the best mean")
    axes[1].set_xlabel("0: random policy, 1: the best mean")
    axes[2].axvline(0.5, color="gray", ls="--", lw=1)
    axes[2].set(xlim=(0, 1), xlabel="probability")
    figure.savefig(path, dpi=120)
