"""The tables and figures of a comparison, from its evaluations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_trpo.numerics.statistics import percentile_bootstrap
from torchrl_trpo.recipes.studies.statistics import (
    RESAMPLES,
    aggregate,
    interquartile_mean,
    probability_of_improvement,
)
from torchrl_trpo.reporting.record import replace_file
from torchrl_trpo.reporting.style import ALGORITHM_COLORS, REFERENCE, drawing

NAMES = {name: name.upper() for name in ALGORITHM_COLORS}


def display_name(algorithm: str) -> str:
    """The name of an algorithm or of a variant, such as ``hatrpo-team``, in tables and figures."""
    recipe, _, variant = algorithm.partition("-")
    return f"{NAMES[recipe]} {variant}".strip()


def _color(algorithm: str) -> str:
    return ALGORITHM_COLORS[algorithm.partition("-")[0]]


def _style(algorithm: str) -> str:
    return "--" if "-" in algorithm else "-"


@dataclass(frozen=True)
class Curves:
    """The evaluations of one algorithm on one task."""

    frames: Tensor  # the environment steps at each evaluation, [n_points]
    cpu_s: Tensor  # the processor seconds of training until then, [n_runs, n_points]
    returns: Tensor  # [n_runs, n_points]
    stds: Tensor  # the standard deviations of the returns within an evaluation, [n_runs, n_points]
    exploring: Tensor  # the returns of the policy as it explored in training, [n_runs, n_points]; NaN: not known

    def at_cpu(self, seconds: float) -> Tensor:
        """The return of each run at a number of processor seconds, ``[n_runs]``, linear between two evaluations.

        It is the last one if the run had ended, NaN if it had no evaluation yet.
        """
        points = zip(self.cpu_s.numpy(), self.returns.numpy(), strict=True)
        return torch.tensor([np.interp(seconds, *run, left=np.nan) for run in points], dtype=torch.float64)

    def frames_to(self, value: float) -> Tensor:
        """The frames after which each run first had a return, ``[n_runs]``; infinite if it never had."""
        return torch.where(self.returns >= value, self.frames, math.inf).amin(1)


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
        for task, name in itertools.product(self.tasks, self.algorithms):
            frames = {
                float(runs[task, each, seed][-1]["frames"])
                for each in (name, self.algorithms[0])
                for seed in self.seeds
            }
            if len(frames) > 1:
                raise ValueError(f"{task}: {name} and {self.algorithms[0]} have {sorted(frames)} frames, not the same.")
        self.random = {task: float(self.curves[task, "random"].returns.mean()) for task in self.tasks}
        self.learned = [task for task in self.tasks if any(self._learns(name, task) for name in self.algorithms)]

    @staticmethod
    def _curves(runs: Sequence[Sequence[Mapping[str, Any]]]) -> Curves:
        columns = {
            name: torch.tensor([[_number(row.get(name)) for row in run] for run in runs], dtype=torch.float64)
            for name in ("frames", "cpu_s", "evaluation_return", "evaluation_std", "episode_return")
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

    def share_of_best(self, task: str, share: float) -> float:
        """The return that is a share of the way from the random policy's to the best algorithm's mean at the end."""
        best = max(float(self.final(task, name).mean()) for name in self.algorithms)
        return self.random[task] + share * (best - self.random[task])

    def scores(self, algorithm: str, *, equal_cpu: bool = False) -> Tensor:
        """Normalised returns: 0 is a random policy, 1 the best algorithm's mean over seeds at equal frames.

        They are ``[n_tasks_learned, n_seeds]``, with ``equal_cpu`` at :meth:`cpu_budget`, else at the end of the runs.
        A run that has no evaluation yet has 0.
        """
        scores = []
        for task in self.learned:
            best, curves = self.share_of_best(task, 1.0), self.curves[task, algorithm]
            returns = curves.at_cpu(self.cpu_budget(task)) if equal_cpu else curves.returns[:, -1]
            score = (returns - self.random[task]) / (best - self.random[task])
            scores.append(score.where(~returns.isnan(), 0.0))
        return torch.stack(scores)


def _number(cell: Any) -> float:
    """A number of a CSV file; NaN where there is none."""
    return math.nan if cell in (None, "") else float(cell)


def write_report(rows: Sequence[Mapping[str, Any]], plan: str, folder: Path) -> list[Path]:
    """Writes ``<plan>.md`` and the figures from the rows of ``<plan>.csv``; gives the paths of all of them.

    There are no figures of more algorithms than there are colours.
    """
    comparison = Comparison(rows)
    paths = [folder / f"{plan}.md"]
    replace_file(paths[0], _tables(comparison, plan))
    if not _can_be_drawn(comparison):
        return paths
    for name, x, label in (("frames", "frames", "thousand frames"), ("cpu", "cpu_s", "processor seconds")):
        paths.append(folder / f"{plan}_{name}.png")
        _plot_curves(comparison, x, label, paths[-1])
    if comparison.learned:
        paths.append(folder / f"{plan}_scores.png")
        _plot_scores(comparison, paths[-1])
    return paths


def _can_be_drawn(comparison: Comparison) -> bool:
    """Whether figures can be read: with more algorithms than colours they cannot."""
    return len(comparison.algorithms) <= len(ALGORITHM_COLORS)


def _tables(comparison: Comparison, plan: str) -> str:
    names = comparison.algorithms
    seeds = comparison.seeds
    head = f"| | {' | '.join(display_name(name) for name in names)} |"
    rule = f"|---|{'---:|' * len(names)}"
    frames = {task: int(comparison.curves[task, names[0]].frames[-1]) for task in comparison.tasks}
    command = "make results" if plan == "comparison" else f'make results ARGS="--plan {plan}"'
    hours = sum(float(comparison.curves[task, name].cpu_s[:, -1].sum()) for task in frames for name in names) / 3600
    lines = [
        f"# {'The comparison' if plan == 'comparison' else plan.capitalize().replace('_', ' ')} in numbers",
        "",
        f"<!-- Written by {command} -->",
        "",
        f"Each algorithm was trained on each task with {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(map(str, seeds))}, in {hours:.1f} processor hours in all.",
        "",
        "## Returns at the end",
        "",
        "A cell has the return of the deterministic policy at the end: the mean over seeds [smallest, largest]. The "
        "highest mean is **bold**. So are those that may equal it: the 95 % interval of the difference, by a bootstrap "
        "over seeds, holds 0.",
        "",
        head.replace("| |", "| task | frames | random |", 1),
        rule.replace("|---|", "|---|---:|---:|", 1),
    ]
    for task in comparison.tasks:
        finals = {name: comparison.final(task, name) for name in names}
        best = max(finals.values(), key=lambda values: float(values.mean()))
        digits = "z.1f" if best.abs().max() >= 10 else "z.2f"
        texts = [format(comparison.random[task], digits)]
        for values in finals.values():
            text = _with_range(float(values.mean()), float(values.min()), float(values.max()), digits)
            texts.append(f"**{text}**" if values is best or _may_equal(values, best) else text)
        lines.append(f"| `{task}` | {frames[task]:,} | {' | '.join(texts)} |")

    def section(title: str, text: str, tasks: Sequence[str], cell: Callable[[str, str], str]) -> list[str]:
        rows = [f"| `{task}` | {' | '.join(cell(task, name) for name in names)} |" for task in tasks]
        return ["", f"## {title}", "", text, "", head.replace("| |", "| task |", 1), rule, *rows]

    def exploring(task: str, name: str) -> str:
        values = comparison.curves[task, name].exploring[:, -1]
        return f"{values.mean():{'z.1f' if values.abs().max() >= 10 else 'z.2f'}}"

    def frames_to_best(task: str, name: str) -> str:
        mean = comparison.curves[task, name].frames_to(comparison.share_of_best(task, 0.9)).mean()
        return f"{mean:,.0f}" if mean.isfinite() else "–"

    if all(curves.exploring.isfinite().all() for (_, name), curves in comparison.curves.items() if name != "random"):
        lines += section(
            "Returns as the policy explores",
            "A cell has the return of the episodes that ended in the last iteration of training, mean over seeds. "
            "Their actions are sampled.",
            comparison.tasks,
            exploring,
        )
    if comparison.learned:
        lines += section(
            "Frames to 90 % of the best",
            "A cell has the frames after which the deterministic policy first had 90 % of the best mean return at the "
            "end, counted from the random policy's. It is the mean over seeds. A dash: not all seeds had it.",
            comparison.learned,
            frames_to_best,
        )
    lines += section(
        "Processor seconds",
        "A cell has the processor seconds of a run, mean over seeds.",
        comparison.tasks,
        lambda task, name: f"{comparison.curves[task, name].cpu_s[:, -1].mean():.0f}",
    )
    can_be_drawn = _can_be_drawn(comparison)
    lines += ["", "## Learning curves"] if can_be_drawn else []
    for name, over in (("frames", "frames"), ("cpu", "processor seconds")) if can_be_drawn else ():
        lines += ["", f"![Returns over {over}]({plan}_{name}.png)", ""]
        lines.append(
            f"*Returns of the deterministic policy over {over}: means over seeds, with 95 % intervals by a bootstrap "
            f"over seeds. Drawn by `{command}`.*"
        )
    if not comparison.learned:
        return "\n".join([*lines, "", "No algorithm learned any task in these frames."]) + "\n"
    left_out = [f"`{task}`" for task in comparison.tasks if task not in comparison.learned]
    lines += [
        "",
        "## Scores over all tasks",
        "",
        "A score is 0 for a random policy and 1 for the best algorithm's mean at equal frames. The bootstrap holds "
        "that mean fixed. Equal processor seconds are those that a task's cheapest algorithm takes for all frames. A "
        "run without an evaluation until then has 0. Brackets hold 95 % intervals, from resampled seeds.",
        "",
    ]
    if left_out:
        lines += [f"There is no score where no algorithm learned a task in these frames: {', '.join(left_out)}.", ""]
    lines += [head.replace("| |", "| score |", 1), rule]
    budgets = (("equal frames", False), ("equal processor seconds", True))
    for title, equal_cpu in budgets:
        for statistic, function in (("interquartile mean", interquartile_mean), ("mean", _mean)):
            scores = [aggregate(comparison.scores(name, equal_cpu=equal_cpu), function) for name in names]
            lines.append(f"| {statistic}, {title} | {' | '.join(itertools.starmap(_with_range, scores))} |")
    for other in [name for name in ("mappo", "ippo") if name in names]:
        for title, equal_cpu in budgets:
            chances = [_improvement(comparison, name, other, equal_cpu) for name in names]
            texts = ["" if chance is None else _with_range(*chance) for chance in chances]
            lines.append(f"| P(better than {display_name(other)}), {title} | {' | '.join(texts)} |")
    if can_be_drawn:
        lines += ["", f"![Aggregate scores]({plan}_scores.png)", ""]
        lines.append(
            "*Interquartile means of the scores, and the probability of being better than MAPPO, with 95 % intervals. "
            f"Drawn by `{command}`.*"
        )
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


def _with_range(value: float, low: float, high: float, digits: str = ".2f") -> str:
    """The value and its range, between which alone a line may break; without a range of one value."""
    if low == high:
        return f"{value:{digits}}"
    return f"{value:{digits}} [{low:{digits}},\N{NO-BREAK SPACE}{high:{digits}}]"


def _plot_curves(comparison: Comparison, x: str, label: str, path: Path) -> None:
    """One axis for each task: the mean over seeds and its 95 % bootstrap interval."""
    columns = min(4, len(comparison.tasks))
    rows = -(-len(comparison.tasks) // columns)
    with drawing(path, rows, columns, (3.6 * columns, 3.0 * rows + 0.9)) as (figure, axes):
        figure.set_layout_engine("constrained")
        for axis, task in zip(axes, comparison.tasks, strict=False):
            for name in comparison.algorithms:
                curves = comparison.curves[task, name]
                positions = curves.frames / 1000 if x == "frames" else curves.cpu_s.mean(0)
                bands = [aggregate(point.unsqueeze(0), _mean) for point in curves.returns.unbind(1)]
                mean, low, high = zip(*bands, strict=True)
                axis.plot(positions, mean, color=_color(name), ls=_style(name), label=display_name(name))
                axis.fill_between(positions, low, high, color=_color(name), alpha=0.15, lw=0)
            axis.axhline(comparison.random[task], **REFERENCE, label="random")
            axis.set_title(task.partition("/")[2])
            axis.set_xlim(left=0)
        for axis in axes[len(comparison.tasks) :]:
            axis.remove()
        figure.supxlabel(label)
        figure.supylabel("episode return, mean over agents")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 2 * columns))


def _plot_scores(comparison: Comparison, path: Path) -> None:
    """Aggregate scores, and the probability that an algorithm is better than MAPPO, with 95 % intervals."""
    panels = (
        ("Equal frames", "score, interquartile mean"),
        ("Equal processor seconds", "score, interquartile mean"),
        ("Better than MAPPO, equal frames", "probability"),
    )
    names = list(reversed(comparison.algorithms))
    with drawing(path, 1, 3, (14, 0.5 * len(names) + 1.6), sharey=True) as (figure, axes):
        figure.set_layout_engine("constrained")
        for position, name in enumerate(names):
            values = [
                aggregate(comparison.scores(name)),
                aggregate(comparison.scores(name, equal_cpu=True)),
                _improvement(comparison, name, "mappo", False) if "mappo" in names else None,
            ]
            for axis, value in zip(axes, values, strict=True):
                if value is not None:
                    axis.plot(value[1:], [position] * 2, color=_color(name), lw=5, alpha=0.5)
                    filled = _color(name) if _style(name) == "-" else "white"  # of variants hollow
                    axis.plot(value[0], position, "o", color=_color(name), markerfacecolor=filled, mew=2, ms=11)
        for axis, (title, label) in zip(axes, panels, strict=True):
            axis.set(title=title, xlabel=label)
            axis.grid(visible=False, axis="y")
        axes[1].sharex(axes[0])
        axes[0].autoscale_view()
        axes[0].set_yticks(range(len(names)), [display_name(name) for name in names])
        axes[0].set_ylim(-0.5, len(names) - 0.5)
        axes[2].axvline(0.5, **REFERENCE)
        axes[2].set_xlim(0, 1)
