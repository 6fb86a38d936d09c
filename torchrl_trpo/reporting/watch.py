"""A view of a run, or of a sweep's runs, in the terminal: while it is going on, and afterwards.

python -m torchrl_trpo.reporting.watch outputs/hatrpo/2026-01-31_12-00-00
python -m torchrl_trpo.reporting.watch outputs/hatrpo/2026-01-31_12-00-00_sweep --once
python -m torchrl_trpo.reporting.watch outputs/hatrpo/2026-01-31_12-00-00 --plot
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from torchrl_trpo.errors import SettingError
from torchrl_trpo.reporting.plots import plot_diagnostics
from torchrl_trpo.reporting.record import RunRecord, find_runs, read_run
from torchrl_trpo.reporting.symptoms import find_symptoms

_BARS = "▁▂▃▄▅▆▇█"
_BAR_WIDTH = 30
_WIDTH = 100
"""Of what is printed where there is no terminal."""
_COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
_SPEED_ROWS = 10
"""The iterations that the speed is measured over."""


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of bars.

    Args:
        values: the numbers; those that are not finite leave a gap.
        width: the most bars; of more numbers, neighbours are averaged.

    Returns:
        The line.
    """
    size = max(1, math.ceil(len(values) / width))
    parts = [[v for v in values[i : i + size] if math.isfinite(v)] for i in range(0, len(values), size)]
    means = [sum(part) / len(part) if part else math.nan for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    heights = [(mean - low) / span if span else 0.5 for mean in means]
    return "".join(_BARS[round(h * (len(_BARS) - 1))] if math.isfinite(h) else " " for h in heights)


def speed(record: RunRecord) -> tuple[float, float]:
    """How fast a run goes.

    Args:
        record: the run.

    Returns:
        Its frames per second, over the last iterations, and the seconds that it still needs; NaN if nobody knows.
    """
    frames, seconds = ([0.0, *record.column(name)][-_SPEED_ROWS - 1 :] for name in ("frames", "wall_s"))
    if len(frames) < 2 or seconds[-1] <= seconds[0]:
        return math.nan, math.nan
    per_second = (frames[-1] - frames[0]) / (seconds[-1] - seconds[0])
    return per_second, max(0, record.total_frames - record.frames) / per_second


def run_view(record: RunRecord) -> RenderableType:
    """What is seen of one run.

    Args:
        record: the run.

    Returns:
        Something to print with rich.
    """
    lines: list[RenderableType] = [_title(record), Text(str(record.folder), style="dim"), _progress(record)]
    if record.column("frames"):
        lines.append(Padding(_figures(record), (1, 0)))
    else:
        lines.append(Text("No iteration is done yet."))
    lines += [Text(f"warning in iteration {report}", style="yellow") for report in record.reports[-3:]]
    for symptom in find_symptoms(record):
        lines.append(Text(f"{symptom.name}: {symptom.told} See docs/not-learning.md.", style="magenta"))
    return Group(*lines)


def sweep_view(records: Sequence[RunRecord], folder: Path) -> RenderableType:
    """What is seen of the runs in a folder.

    Args:
        records: the runs.
        folder: the folder that they are in.

    Returns:
        Something to print with rich.
    """
    table = Table(box=None, pad_edge=False, title=f"{folder}: {len(records)} runs", title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("state", overflow="fold")
    for name in ("done", "frames/s", "left", "return"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name in ("KL/max_kl", "accepted"):
        table.add_column(name, justify="right")
    for record in records:
        per_second, left = speed(record)
        table.add_row(
            str(record.folder.relative_to(folder)),
            Text(record.state, style=_COLOURS.get(record.state, "yellow")),
            f"{record.frames / record.total_frames:.0%}",
            _shown(per_second, ".0f"),
            _duration(left) if record.state == "running" else "",
            _shown(record.episode_return, ".2f"),
            sparkline(record.column("episode_return"), 16),
            _shown(record.recent("kl") / record.max_kl, ".2f") if record.max_kl else "",
            _shown(record.recent("accepted"), ".2f"),
        )
    reasons = [f"{r.folder.relative_to(folder)}: {r.reason}" for r in records if r.reason]
    return Group(table, *(Text(reason, style="yellow") for reason in reasons))


def _title(record: RunRecord) -> Text:
    reason = f" ({record.reason})" if record.reason else ""
    return Text.assemble(
        (record.title, "bold"), ", ", (record.state, _COLOURS.get(record.state, "yellow")), (reason, "yellow")
    )


def _progress(record: RunRecord) -> Text:
    per_second, left = speed(record)
    iteration = len(record.column("frames")) and int(record.column("iteration")[-1])
    told = f"{record.frames} of {record.total_frames} frames, iteration {iteration}"
    if math.isfinite(per_second):
        told += f", {per_second:.0f} frames/s"
        told += f", {_duration(left)} left" if record.state == "running" else ""
    done = min(_BAR_WIDTH, _BAR_WIDTH * record.frames // record.total_frames)
    return Text.assemble(("█" * done, "green"), ("░" * (_BAR_WIDTH - done), "dim"), f" {told}")


def _figures(record: RunRecord) -> Table:
    """The last numbers, their course and what they are measured against."""
    table = Table(box=None, pad_edge=False, show_header=True)
    for name, justify in (("mean of the last 5", "left"), ("", "right"), ("course", "left"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    returns = [value for value in record.column("episode_return") if math.isfinite(value)]
    best = f"best {max(returns):.2f}" if returns else "no episode has ended"
    rows = [("return", record.episode_return, ".2f", "episode_return", best)]
    kl = record.recent("kl")
    if record.max_kl is None:
        rows.append(("KL", kl, ".4f", "kl", "nats"))
    else:
        rows.append(("KL/max_kl", kl / record.max_kl, ".2f", "kl", f"max_kl {record.max_kl:g} nats"))
    rows += [
        ("accepted", record.recent("accepted"), ".2f", "accepted", "share of the regions"),
        ("step fraction", record.recent("step_fraction"), ".2f", "step_fraction", "1 is the full step"),
        ("CG residual", record.recent("cg_residual"), ".3f", "cg_residual", "relative; converged below 0.1"),
        ("clipped rows", record.recent("clip_fraction"), ".2f", "clip_fraction", "share of the rows"),
        (
            "explained variance",
            record.recent("explained_variance"),
            ".2f",
            "explained_variance",
            "1 is a perfect critic",
        ),
        ("entropy", record.recent("entropy"), ".2f", "entropy", "nats"),
        ("factor M", record.recent("factor_std"), ".2f", "factor_std", "standard deviation before the last agent"),
    ]
    for label, value, form, column, note in rows:
        if math.isfinite(value) or column == "episode_return":
            table.add_row(label, _shown(value, form), sparkline(record.column(column)), Text(note, style="dim"))
    return table


def _shown(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "–"


def _view(folder: Path) -> tuple[RenderableType, bool]:
    """What is seen of a folder, and whether it will change."""
    if (folder / "config.yaml").exists():
        record = read_run(folder)
        return run_view(record), record.state in {"running", "silent"}
    records = [read_run(path) for path in find_runs(folder)]
    if not records:
        return Text(f"No run in {folder} yet."), True
    return sweep_view(records, folder), True  # another may begin


def _plot(folder: Path) -> None:
    for path in find_runs(folder):
        record = read_run(path)
        if record.column("frames"):
            print(plot_diagnostics(record, path / "diagnostics.png"))
        else:
            print(f"{path}: no iteration is done yet.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m torchrl_trpo.reporting.watch",
        description="Shows how a run, or each run of a sweep, goes on; Ctrl+C ends it.",
    )
    parser.add_argument("folder", type=Path, help="the folder of a run, or one with the folders of runs in it")
    parser.add_argument("--once", action="store_true", help="print once and end, as where there is no terminal")
    parser.add_argument("--plot", action="store_true", help="draw diagnostics.png in the folder of each run, and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="default: 2")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    try:
        if not given.folder.is_dir():
            raise SettingError(f"folder: {str(given.folder)!r} is no folder. Legal: that of a run or a sweep.")
        if given.plot:
            _plot(given.folder)
            return
        view, changes = _view(given.folder)
        if given.once or not console.is_terminal:
            console.print(view)
            return
        with Live(view, console=console, auto_refresh=False) as live:
            while changes:
                time.sleep(given.every)
                view, changes = _view(given.folder)
                live.update(view, refresh=True)
    except KeyboardInterrupt:
        return
    except SettingError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
