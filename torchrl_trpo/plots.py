"""The learning curve of a run."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure


def plot_learning_curve(metrics: Path, path: Path, *, title: str, max_kl: float | None) -> Path:
    """Plots return (of each group, if there are several), KL divergence and accepted steps over frames.

    Args:
        metrics: the run's ``metrics.csv``.
        path: where the picture goes.

    Keyword Args:
        title: the picture's title.
        max_kl: the trust region's radius in nats, drawn as a line; None where there is no trust region.

    Returns:
        The path.
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    frames = [int(row["frames"]) / 1000 for row in rows]
    columns = {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    figure.suptitle(title)
    groups = [name for name in columns if name.startswith("episode_return_") and name != "episode_return_sum"]
    for name in groups or ["episode_return"]:
        axes[0].plot(frames, columns[name], label=name.removeprefix("episode_return_"))
    if groups:
        axes[0].legend()
    axes[0].set(title="Episode return", ylabel="mean over agents")
    axes[1].plot(frames, columns["kl"], color="tab:orange", label="KL of the steps kept")
    if max_kl is not None:
        axes[1].axhline(max_kl, color="gray", ls="--", lw=1, label="max_kl")
    axes[1].set(title="KL divergence", ylabel="nats", ylim=(0, None if max_kl is None else 1.15 * max_kl))
    axes[1].legend(loc="lower right")
    axes[2].plot(frames, columns["accepted"], color="tab:green")
    axes[2].set(title="Accepted steps", ylabel="share of regions", ylim=(-0.05, 1.05))
    for axis in axes:
        axis.set_xlabel("thousand frames")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
