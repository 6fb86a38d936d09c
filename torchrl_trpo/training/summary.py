"""The end of a training run: the evaluation of the policy, the film, and ``summary.json``."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_trpo.envs.normalization import observation_norm
from torchrl_trpo.reporting.diagnosis import find_symptoms
from torchrl_trpo.reporting.loggers import RunLogger
from torchrl_trpo.reporting.record import read_run, replace_file
from torchrl_trpo.training.episodes import evaluate
from torchrl_trpo.training.film import film_run
from torchrl_trpo.training.policy import on_raw_observations

_FILES = (
    "learning_curve.png",
    "diagnostics.png",
    "film.mp4",
    "metrics.csv",
    "summary.json",
    "config.yaml",
    "checkpoints",
)


def summarize(
    folder: Path,
    settings: Mapping[str, Any],
    progress: Mapping[str, Any],
    *,
    env: EnvBase,
    policy: TensorDictModuleBase,
    logger: RunLogger,
) -> dict[str, Any]:
    """Evaluates and films the policy of a run that has done its frames, writes ``summary.json`` and prints it.

    The environment's normaliser is frozen. Returns what ``summary.json`` holds.
    """
    record = read_run(folder)
    if (norm := observation_norm(env)) is not None:
        norm.freeze()
    evaluation = evaluate(env, policy, max_steps=settings["env"]["max_steps"])
    frames, wall_s = progress["frames"], progress["wall_s"]
    summary = {
        "algorithm": settings["algorithm"],
        "env": settings["env"]["name"],
        "seed": settings["seed"],
        "frames": frames,
        "wall_s": wall_s,
        "cpu_s": progress["cpu_s"],
        "frames_per_s": frames / wall_s,
        "episode_return": record.episode_return,
        "best_return": progress["best_return"],
        "evaluation_return": float(evaluation.mean()),
        "evaluation_episodes": evaluation.numel(),
    }
    if settings["film"]:
        acting = on_raw_observations(env, policy)
        film = film_run(settings, acting, folder / "film.mp4", seed=settings["seed"], device=env.device)
        if film is not None:
            logger.log_film(film, frames)
    logger.log({"evaluation_return": summary["evaluation_return"]}, frames)
    unknown = {name: None for name, value in summary.items() if isinstance(value, float) and not math.isfinite(value)}
    text = json.dumps(summary | unknown, indent=2) + "\n"
    replace_file(folder / "summary.json", text)  # last: it marks the run as finished
    n_recent = min(5, sum(not math.isnan(value) for value in record.column("episode_return")))
    print(
        f"{record.title}: episode return {summary['episode_return']:.1f} (mean of the last {n_recent} iterations "
        f"with finished episodes), {summary['evaluation_return']:.1f} acting deterministically, {frames} frames in "
        f"{wall_s:.0f} s."
    )
    for name in _FILES:
        if (folder / name).exists():
            print(f"  {folder / name}")
    for symptom in find_symptoms(record):
        print(f"  {symptom.name}: {symptom.figures} See docs/not-learning.md.")
    typed = shlex.quote(str(folder))
    print(f"To play and film the policy: make evaluate RUN={typed} (or python -m torchrl_trpo.evaluate {typed})")
    return summary
