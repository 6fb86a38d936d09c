"""Whether a run may be continued: the settings that must be the same, the frames that are left, the rows on disk."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchrl._utils import logger

from torchrl_trpo.errors import SettingError
from torchrl_trpo.reporting.record import flat, read_rows

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
    """Raises SettingError if a run has done all its frames and has written its summary."""
    summary, train = folder / "summary.json", now["train"]
    has_summary = summary.exists() and json.loads(summary.read_text())["frames"] == frames
    if has_summary and frames >= train["total_frames"]:
        raise SettingError(
            f"resume: {str(folder)!r} has done {frames} frames already, and train.total_frames="
            f"{train['total_frames']}. Nearest that continues: train.total_frames="
            f"{frames + train['frames_per_batch']}."
        )


def rows_before(metrics: Path, iteration: int) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` up to a checkpoint; later iterations will be done again.

    If the file is gone, a warning says so and there are no rows. Raises SettingError if rows are missing in between.
    """
    if not metrics.exists():
        logger.warning(f"{metrics} is gone: it begins anew with iteration {iteration + 1}.")
        return []
    rows = [row for row in read_rows(metrics) if int(row["iteration"]) <= iteration]
    numbers = [int(row["iteration"]) for row in rows]
    if numbers != list(range(iteration - len(rows) + 1, iteration + 1)):
        missing = sorted(set(range(1, iteration + 1)) - set(numbers))
        raise SettingError(
            f"resume: {metrics} should have one row for each iteration up to {iteration}, in order; missing are "
            f"{missing or 'none'}. Put the file back as it was, or move it away to begin it anew."
        )
    return rows


def _value(settings: Any, name: str) -> Any:
    return functools.reduce(lambda section, part: section.get(part), name.split("."), settings)
