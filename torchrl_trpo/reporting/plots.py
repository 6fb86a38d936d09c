"""The pictures of a run: the learning curve, and a grid of panels that show how its updates go."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl._utils import logger

from torchrl_trpo.reporting.diagnosis import Threshold
from torchrl_trpo.reporting.record import RunRecord, read_run
from torchrl_trpo.reporting.style import ALGORITHM_COLORS, REFERENCE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Panel = tuple[str, str, Mapping[str, str], Mapping[str, Any]]
_PANELS: tuple[_Panel, ...] = (
    # Title, unit, the columns with their labels, and settings of the axes.
    ("Episode return", "mean over agents", {"episode_return": ""}, {}),
    ("KL divergence", "nats", {"kl": "of the steps kept"}, {}),
    ("Accepted steps", "share of regions", {"accepted": ""}, {"ylim": (-0.05, 1.05)}),
    (
        "Surrogate's improvement",
        "advantage's units",
        {"improvement": "reached", "expected_improvement": "linear model"},
        {},
    ),
    ("Step fraction", "share of the full step", {"step_fraction": ""}, {"ylim": (-0.05, 1.05)}),
    ("CG residual", "relative to the gradient", {"cg_residual": ""}, {}),
    ("Entropy", "nats", {"entropy": ""}, {}),
    ("Explained variance of the critic", "share", {"explained_variance": ""}, {}),
    ("Factor M before the last agent", "standard deviation", {"factor_std": ""}, {}),
    ("Clipped rows", "share of rows", {"clip_fraction": ""}, {"ylim": (-0.05, 1.05)}),
)
_COLUMNS = 3
_SHARE_OF_TIME = 0.03


class Pictures:
    """Draws the pictures of a run that is going on: ``learning_curve.png`` and ``diagnostics.png`` in its folder.

    A picture that cannot be drawn is a warning, and the training goes on.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start = time.perf_counter()
        self._seconds = 1.0  # what the first drawing, with the import of matplotlib, is expected to take

    def draw_now_and_then(self) -> None:
        """Draws the pictures, unless drawing takes more than 3 % of the time."""
        if self._seconds <= _SHARE_OF_TIME * (time.perf_counter() - self._start):
            self.draw()

    def draw(self) -> None:
        """Draws the pictures."""
        start = time.perf_counter()
        try:
            record = read_run(self._folder)
            plot_learning_curve(record, self._folder / "learning_curve.png")
            plot_diagnostics(record, self._folder / "diagnostics.png")
        except Exception as error:  # a full disk, a missing font, a file that someone has edited
            logger.warning(f"The pictures of {self._folder} could not be drawn: {type(error).__name__}: {error}")
        self._seconds += time.perf_counter() - start


def plot_learning_curve(record: RunRecord, path: Path) -> Path:
    """Plots return (of each group, if there are several), KL divergence and accepted steps over frames.

    Args:
        record: the run, with at least one iteration.
        path: where the picture goes.

    Returns:
        The path.
    """
    return _plot(record, _PANELS[:_COLUMNS], path)


def plot_diagnostics(record: RunRecord, path: Path) -> Path:
    """Plots over frames how the updates go; ``docs/diagnostics.md`` explains each panel.

    Args:
        record: the run, with at least one iteration; a panel without numbers is left out.
        path: where the picture goes.

    Returns:
        The path.
    """
    panels = [panel for panel in _PANELS if any(math.isfinite(v) for name in panel[2] for v in record.column(name))]
    return _plot(record, panels, path)


def _plot(record: RunRecord, panels: Sequence[_Panel], path: Path) -> Path:
    """Draws panels in rows of three, laid out by hand, which is fast."""
    rows = max(1, math.ceil(len(panels) / _COLUMNS))
    height = 3.3 * rows + 0.5
    with drawing(path, rows, _COLUMNS, (13, height)) as (figure, axes):
        figure.subplots_adjust(0.085, 0.65 / height, 0.985, 1 - 0.95 / height, wspace=0.34, hspace=0.55)
        figure.suptitle(record.title)
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, record, *panel)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
    return path


def _draw(
    axis: Axes, record: RunRecord, title: str, unit: str, columns: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """One panel."""
    if title == "Episode return":
        groups = [name for name in record.columns if name.startswith("episode_return_") and not name.endswith("_sum")]
        columns = {name: name.removeprefix("episode_return_") for name in groups} or columns
    frames = [frames / 1000 for frames in record.column("frames")]
    marker = "." if len(frames) < 30 else ""
    own = ALGORITHM_COLORS.get(record.config["algorithm"].lower(), "C0")
    colors = [own, "#8C8C8C", *(color for color in ALGORITHM_COLORS.values() if color != own)]
    for color, (name, label) in zip(itertools.cycle(colors), columns.items(), strict=False):
        axis.plot(frames, record.column(name), color=color, marker=marker, label=label or None)
    if title == "KL divergence" and record.max_kl is not None:
        axis.axhline(record.max_kl, **REFERENCE, label="max_kl")
    if title == "KL divergence":
        axis.set_ylim(0, None if record.max_kl is None else 1.15 * record.max_kl)
    if title == "CG residual":
        axis.axhline(Threshold.CG_RESIDUAL, **REFERENCE, label="converged below")
    axis.set(title=title, ylabel=unit, xlabel="thousand frames", **settings)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="best")
