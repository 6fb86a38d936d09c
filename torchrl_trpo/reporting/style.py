"""The look of every figure: fonts that are read at half the size, colours for the colour-blind, a thin grid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_trpo.reporting.record import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALGORITHM_COLORS = {
    "hatrpo": "#D55E00",
    "matrpo": "#009E73",
    "itrpo": "#CC79A7",
    "mappo": "#0072B2",
    "ippo": "#56B4E9",
    "happo": "#E69F00",
    "trpo": "#000000",
}
"""The colour of each algorithm in all figures: the palette of Okabe and Ito (2008), without its yellow."""
REFERENCE: dict[str, Any] = {"color": "#767676", "ls": "--", "lw": 1.2, "zorder": 1}
"""How lines to compare with are drawn, such as a limit or a random policy."""
_DPI = 120
_STYLE: Any = {  # of matplotlib's rcParams
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.labelsize": 13,
    "axes.edgecolor": "#4D4D4D",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "figure.labelsize": 14,
    "legend.fontsize": 12,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
    "legend.handlelength": 1.5,
    "legend.borderpad": 0.1,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "butt",  # an interval ends where its line ends
    "figure.facecolor": "white",
}


@contextlib.contextmanager
def drawing(
    path: Path, rows: int, columns: int, size: tuple[float, float], **settings: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the project's style, which is saved when the block ends.

    Args:
        path: where it goes; whoever looks meanwhile sees the old picture or the new one.
        rows: how many axes there are below each other.
        columns: how many axes a row has.
        size: the figure's width and height, in inches.
        settings: more for ``Figure.subplots``, such as ``sharey``.

    Yields:
        The figure, and its axes row by row.
    """
    from cycler import cycler  # with matplotlib it takes half a second, which --help does not need
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=ALGORITHM_COLORS.values())}):
        figure = Figure(figsize=size)
        yield figure, list(figure.subplots(rows, columns, squeeze=False, **settings).flat)
        with replacing(path) as file:
            figure.savefig(file, dpi=_DPI)
