"""Whether a run may be continued: the settings that must be the same, the frames that are left, the rows on disk."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchrl._utils import logger

from torchrl_trpo.errors import SettingError
from torchrl_trpo.reporting.record import flat, read_json, read_rows
from torchrl_trpo.training.metrics import COLUMNS

_PACKAGES = ("torchrl-trpo", "torch", "torchrl", "tensordict", "vmas", "mpe2", "gymnasium", "hydra-core")
_FIXED = (  # the task, the networks and the random numbers of a run
    "algorithm",
    "env.name",
    "env.factory",
    "env.kwargs",
    "env.num_envs",
    "env.max_steps",
    "env.continuous_actions",
    "normalize_observations",
    "actor.hidden",
    "actor.sharing",
    "actor.network",
    "critic.hidden",
    "critic.network",
    "critic.share_params",
    "critic.inputs",
    "critic.agent_one_hot",
    "critic.others_actions",
    "critic.value_norm",
    "seed",
)
_WITHOUT_EFFECT = ("output_dir", "resume", "versions", "film", "checkpoint", "logger")  # on what is learned


def full_record(cfg: DictConfig, algorithm: str) -> dict[str, Any]:
    """The settings of a run, resolved, with its algorithm and the versions of the packages, as plain containers."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**settings, "algorithm": algorithm, "versions": versions}


def check_continued(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Compares the settings of a resumed run with those it had, and warns of what has changed.

    Returns the dotted names of what has changed. Raises SettingError if the task, a network or the seed has.
    """
    for name in _FIXED:
        was, is_now = _value(before, name), _value(now, name)
        if was != is_now:
            advice = f"Use the recipe of {was}." if name == "algorithm" else f"Leave {name} out to continue it."
            raise SettingError(f"resume: the run in {str(folder)!r} has {name}={was}, and now it is {is_now}. {advice}")
    versions = {n: (v, now["versions"].get(n)) for n, v in before["versions"].items() if now["versions"].get(n) != v}
    if versions:
        listed = ", ".join(f"{name} {was} (now {is_now})" for name, (was, is_now) in versions.items())
        logger.warning(f"The run was made with {listed}: what follows may differ from what it would have been.")
    changed = []
    old, new = flat(before), flat(now)
    for name in old | new:
        was, is_now = old.get(name), new.get(name)
        if was != is_now and name.partition(".")[0] not in _WITHOUT_EFFECT:
            logger.warning(f"{name} was {was} until now, and is {is_now} from here on.")
            changed.append(name)
    return changed


def check_unfinished(folder: Path, frames: int, now: Mapping[str, Any]) -> None:
    """Raises SettingError unless a run has whole batches of frames left, or none and no summary yet."""
    summary, batch, total = folder / "summary.json", now["train"]["frames_per_batch"], now["train"]["total_frames"]
    has_summary = summary.exists() and read_json(summary, "frames")["frames"] == frames
    left = total - frames
    if left < 0 or (has_summary and left == 0):
        raise SettingError(
            f"resume: {str(folder)!r} has done {frames} frames already, and train.total_frames={total}. Nearest that "
            f"continues: train.total_frames={frames + batch}."
        )
    if left % batch:
        raise SettingError(
            f"resume: {str(folder)!r} has done {frames} frames, and the {left} left to train.total_frames={total} are "
            f"not a multiple of train.frames_per_batch={batch}. Legal: one that divides both, such as "
            f"{math.gcd(left, total)}."
        )


def rows_before(metrics: Path, iteration: int) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` up to a checkpoint; later iterations will be done again.

    If the file is gone, a warning says so and there are no rows. Raises SettingError if all rows are missing or some in
    between, or if there are columns that no run writes.
    """
    if not metrics.exists():
        logger.warning(f"{metrics} is gone: it begins anew with iteration {iteration + 1}.")
        return []
    rows = [row for row in read_rows(metrics) if int(row["iteration"]) <= iteration]
    names = rows[0] if rows else ()
    if unknown := [name for name in names if name not in COLUMNS and not name.startswith("episode_return_")]:
        raise SettingError(
            f"resume: {metrics} has a column {unknown[0]!r}, which would be lost. Put the file back as it was, or move "
            "it away to begin it anew."
        )
    numbers = [int(row["iteration"]) for row in rows]
    if numbers != list(range(iteration - len(rows) + 1, iteration + 1)) or (iteration and not rows):
        missing = sorted(set(range(1, iteration + 1)) - set(numbers))
        raise SettingError(
            f"resume: {metrics} should have one row for each iteration up to {iteration}, in order; missing are "
            f"{missing or 'none'}. Put the file back as it was, or move it away to begin it anew."
        )
    if rows and numbers[0] > 1:
        logger.warning(f"{metrics} begins with iteration {numbers[0]}, and not with 1.")
    return rows


def _value(settings: Any, name: str) -> Any:
    return functools.reduce(lambda section, part: section.get(part), name.split("."), settings)
