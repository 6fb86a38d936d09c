"""The processor time in which HATRPO learns to balance, by the recipe itself."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = 50.0
"""The ``episode_return`` to be reached, the mean of three consecutive iterations."""
SETTINGS = {
    "env": "vmas/balance",
    "env.num_envs": 300,
    "env.compiled": "true",
    "train.frames_per_batch": 3000,
    "train.total_frames": 240_000,
    "updater.max_kl": 0.02,
    "actor.hidden": "[64,64]",
    "critic.hidden": "[64,64]",
    "critic.lr": 0.002,
}
"""Many environments and short batches: what is spent on a frame is least there."""


def bench(repetitions: int, quick: bool) -> dict[str, float]:
    """Seconds, frames and updates until the target is reached.

    Args:
        repetitions: unused; each seed is run once.
        quick: whether there is one seed instead of three.

    Returns:
        Figures by label; NaN if the target is not reached.
    """
    results = {}
    for seed in (0,) if quick else (0, 1, 2):
        rows = _train(seed)
        returns = [float(row["episode_return"] or "nan") for row in rows]
        reached = (i for i in range(2, len(rows)) if sum(returns[i - 2 : i + 1]) >= 3 * TARGET)
        last = next(reached, None)
        until = rows[: 0 if last is None else last + 1]
        name = f"HATRPO on balance to {TARGET:g}, seed {seed}"
        results[f"{name}: processor time [s]"] = float(until[-1]["cpu_s"]) if until else float("nan")
        results[f"{name}: frames"] = float(until[-1]["frames"]) if until else float("nan")
        for part in ("collect_s", "policy_s", "critic_s"):
            share = sum(float(row[part]) for row in until) / float(until[-1]["wall_s"]) if until else float("nan")
            results[f"{name}: {part} [% of time]"] = 100 * share
    return results


def _train(seed: int) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"{name}={value}" for name, value in SETTINGS.items()]
        command = [sys.executable, "-m", "torchrl_trpo.recipes.hatrpo", *settings, f"seed={seed}", "film=false"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, f"output_dir={folder}"], check=True, capture_output=True, env=environment)
        with (Path(folder) / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))
