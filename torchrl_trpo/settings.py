"""Checks of a recipe's settings, before anything is built."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from torchrl_trpo.groups import GroupKeys
from torchrl_trpo.simulators import known_environments
from torchrl_trpo.suggest import SettingError, nearest

_ENV_DEFAULTS: dict[str, dict[str, Any]] = {
    "vmas": {"num_envs": 60, "max_steps": 100, "continuous_actions": True, "kwargs": {}},
    "pettingzoo": {"num_envs": 20, "max_steps": 25, "continuous_actions": False, "parallel": False, "kwargs": {}},
    "mamujoco": {"num_envs": 10, "max_steps": 1000, "parallel": False, "kwargs": {"agent_conf": "2x3"}},
    "gym": {"num_envs": 10, "max_steps": 1000, "parallel": False, "kwargs": {}},
}
_NOT_RESUMED = ("resume", "output_dir", "algorithm", "versions")
_OPEN = ("env.kwargs.",)  # sections that take any name


def run_recipe(main: Callable[[], Any], recipe: str) -> None:
    """Runs a recipe from the command line; settings that do not exist end it with the nearest ones that do.

    Args:
        main: the ``hydra.main`` function of the recipe.
        recipe: the recipe's file; ``config/<its name>.yaml`` beside it is its config.
    """
    path = Path(recipe).resolve()
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:], path.parent / "config", path.stem)
    except SettingError as error:
        sys.exit(f"error: {error}")
    main()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the command with the message alone when a setting cannot be; other errors keep their traceback."""
    try:
        yield
    except SettingError as error:
        with contextlib.suppress(OSError):  # the folder that Hydra made stays only if something is in it
            Path(HydraConfig.get().runtime.output_dir).rmdir()
        sys.exit(f"error: {error}")


def check_overrides(overrides: Sequence[str], config_dir: Path, config_name: str) -> list[str]:
    """Checks the names in command-line overrides against a recipe's config.

    Args:
        overrides: the arguments of the command line, such as ``["updater.max_kl=0.02"]``.
        config_dir: the folder of the configs.
        config_name: the recipe's config.

    Returns:
        The overrides for Hydra; arguments of a scenario, ``env.kwargs.*``, may be new names. With ``resume=<folder>``
        the settings of that run come first, and the overrides change them.

    Raises:
        SettingError: if a setting or an environment is unknown.
    """
    environments = register_environments(config_dir)
    for choice in [c for override in overrides if override.startswith("env=") for c in override[4:].split(",")]:
        if choice not in environments:
            raise SettingError(f"env: {choice!r}. {nearest(choice, environments)}")
    known: list[str] = []
    checked: list[str] = []
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or name == "env" or name.startswith(("-", "+", "~", "hydra")):
            pass
        elif name.startswith(_OPEN):
            override = f"++{override}"
        else:
            known = known or _setting_names(config_dir, config_name, overrides)
            if name not in known:
                raise SettingError(f"setting {name!r} does not exist. {nearest(name, known)}")
        checked.append(override)
    given = [override.partition("=")[0].lstrip("+") for override in checked]
    folder = next((override.partition("=")[2] for override in checked if override.startswith("resume=")), "null")
    return checked if folder in {"", "null"} else [*_resumed_overrides(Path(folder), given), *checked]


def _resumed_overrides(folder: Path, given: Sequence[str]) -> list[str]:
    """The settings of a run as overrides, without those that are given anew."""
    if not (folder / "config.yaml").exists():
        raise SettingError(f"resume: {str(folder)!r} has no config.yaml. Legal: the folder of a run, which holds one.")
    record: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    overrides = [] if "env" in given else [f"env={record['env']['name']}"]
    for name, value in _settings({k: v for k, v in record.items() if k not in _NOT_RESUMED}):
        if isinstance(value, dict) or name in given or ("env" in given and name.startswith("env.")):
            continue
        overrides.append(f"++{name}={json.dumps(value)}")
    return [*overrides, f"hydra.run.dir={json.dumps(str(folder))}"]


def _settings(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walks through a config, a section before what is in it.

    Yields:
        Each section's and field's dotted name, and its value.
    """
    for key, child in node.items():
        yield f"{prefix}{key}", child
        if isinstance(child, dict):
            yield from _settings(child, f"{prefix}{key}.")


def register_environments(config_dir: Path) -> list[str]:
    """Makes every task of the installed simulators a choice ``env=<library>/<task>``, beside those with a YAML file.

    Args:
        config_dir: the folder of the configs.

    Returns:
        The names of all choices.
    """
    choices = [path.stem for path in (config_dir / "env").glob("*.yaml")]
    for library, tasks in known_environments().items():
        written = {path.stem for path in (config_dir / "env" / library).glob("*.yaml")}
        for task in sorted(written.union(tasks)):
            choices.append(f"{library}/{task}")
            if task not in written:
                node = {"name": choices[-1], **_ENV_DEFAULTS[library]}
                ConfigStore.instance().store(group=f"env/{library}", name=task, node=node, package="env")
    return choices


def _setting_names(config_dir: Path, config_name: str, overrides: Sequence[str]) -> list[str]:
    """The settings there are, with the environment that the overrides choose."""
    chosen = [override.partition(",")[0] for override in overrides if override.startswith("env=")]
    folders = [Path(override.partition("=")[2]) for override in overrides if override.startswith("resume=")]
    if not chosen and folders and (folders[-1] / "config.yaml").exists():
        chosen = [f"env={OmegaConf.load(folders[-1] / 'config.yaml').env.name}"]
    with initialize_config_dir(str(config_dir), version_base=None):
        config: Any = OmegaConf.to_container(compose(config_name, chosen), resolve=False)
    return [name for name, _ in _settings(config)]


def check_settings(cfg: DictConfig) -> None:
    """Checks the sizes of a run against each other.

    Args:
        cfg: the recipe's config.

    Raises:
        SettingError: if a number is not a positive whole number, or the environments cannot give ``frames_per_batch``.
    """
    sizes = {
        "env.num_envs": cfg.env.num_envs,
        "env.max_steps": cfg.env.max_steps,
        "train.total_frames": cfg.train.total_frames,
        "train.frames_per_batch": cfg.train.frames_per_batch,
        "critic.epochs": cfg.critic.epochs,
        "critic.minibatch_size": cfg.critic.minibatch_size,
        "checkpoint.every": cfg.checkpoint.every,
        "checkpoint.keep": cfg.checkpoint.keep,
    }
    for name, value in sizes.items():
        if not _is_size(value):
            raise SettingError(f"{name} must be a whole number of at least 1, got {value!r}.")
    for name, value in {"actor.hidden": cfg.actor.hidden, "critic.hidden": cfg.critic.hidden}.items():
        if not isinstance(value, ListConfig) or not all(map(_is_size, value)):
            raise SettingError(f"{name} must be a list of layer sizes such as [128,128], got {value!r}.")
    legal: dict[str, tuple[Any, list[Any]]] = {
        "actor.sharing": (cfg.actor.get("sharing", "none"), ["all", "group", "none"]),
        "actor.network": (cfg.actor.network, ["mlp", "gru", "lstm"]),
        "critic.network": (cfg.critic.network, ["mlp", "gru", "lstm"]),
        "critic.inputs": (cfg.critic.get("inputs", "state"), ["observations", "state", "both"]),
        "team_reward": (cfg.get("team_reward"), ["mean", "sum", None]),
    }
    for name, (value, choices) in legal.items():
        if value not in choices:
            raise SettingError(f"{name}: {value!r}. {nearest(value, choices)}")
    shares = {"gamma": (cfg.gamma, 1), "lmbda": (cfg.lmbda, 1), "critic.lr": (cfg.critic.lr, math.inf)}
    for name, (value, most) in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
            raise SettingError(f"{name} must be a number from 0 to {most}, got {value!r}.")
    num_envs, frames = cfg.env.num_envs, cfg.train.frames_per_batch
    if frames % num_envs:
        raise SettingError(
            f"train.frames_per_batch={frames} is not a multiple of env.num_envs={num_envs}: every environment gives "
            f"the same number of steps. Nearest: {_multiples(frames, num_envs)}."
        )
    if cfg.train.total_frames % frames:
        raise SettingError(
            f"train.total_frames={cfg.train.total_frames} is not a multiple of train.frames_per_batch={frames}. "
            f"Nearest: {_multiples(cfg.train.total_frames, frames)}."
        )


def check_single_agent(cfg: DictConfig, groups: Sequence[GroupKeys]) -> GroupKeys:
    """Checks that an environment has one agent, without a group.

    Args:
        cfg: the recipe's config.
        groups: the environment's groups.

    Returns:
        The agent's keys.

    Raises:
        SettingError: if it has groups of agents.
    """
    if groups[0].group is not None:
        names = [keys.group for keys in groups]
        raise SettingError(
            f"env: {cfg.env.name!r} has groups of agents, {names}. Use the recipes itrpo, matrpo or hatrpo."
        )
    return groups[0]


def check_teams(cfg: DictConfig, groups: Sequence[GroupKeys]) -> Sequence[GroupKeys]:
    """Checks that an environment has groups of agents.

    Args:
        cfg: the recipe's config.
        groups: the environment's groups.

    Returns:
        The groups.

    Raises:
        SettingError: if it has a single agent without a group.
    """
    if groups[0].group is None:
        raise SettingError(f"env: {cfg.env.name!r} has a single agent, without a group. Use the recipe trpo.")
    return groups


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _multiples(value: int, step: int) -> str:
    """The positive multiples of ``step`` around ``value``."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{below + step}"
