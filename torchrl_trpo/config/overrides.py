"""The overrides of a command line, as Hydra takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from torchrl_trpo.config.schema import RECIPES
from torchrl_trpo.config.validation import find_problems, one_message
from torchrl_trpo.envs.tasks import LIBRARIES, SimulatorError, check_name, known_tasks
from torchrl_trpo.errors import SettingError, nearest

_ENV_DEFAULTS: dict[str, dict[str, Any]] = {
    "vmas": {"num_envs": 60, "max_steps": 100, "continuous_actions": True, "compiled": "auto", "kwargs": {}},
    "pettingzoo": {"num_envs": 20, "max_steps": 25, "continuous_actions": False, "parallel": False, "kwargs": {}},
    "mamujoco": {"num_envs": 10, "max_steps": 1000, "parallel": False, "kwargs": {"agent_conf": "2x3"}},
    "gym": {"num_envs": 10, "max_steps": 1000, "parallel": False, "kwargs": {}},
}
"""The settings of environments without a YAML file, by library."""
_NOT_RESUMED = ("resume", "output_dir", "algorithm", "versions")


def check_overrides(overrides: Sequence[str], config_dir: Path, config_name: str) -> list[str]:
    """Checks the settings of a command line: names, values, and the settings against each other.

    In a sweep, only the first value of each setting is checked.

    Args:
        overrides: the arguments of the command line, such as ``["updater.max_kl=0.02"]``.
        config_dir: the folder of the configs.
        config_name: the recipe's config.

    Returns:
        The overrides for Hydra. With ``resume=<folder>``, the settings of that run come first.

    Raises:
        SettingError: if settings or environments are unknown, missing or invalid; it lists all of them.
    """
    given = dict(map(_split, overrides))
    envs = given["env"].split(",") if "env" in given else []
    folder = Path(given["resume"]) if given.get("resume", "null") not in {"", "null"} else None
    problems = {"env": list(_env_problems(envs, config_dir))}
    if folder is not None:
        problems["resume"] = _resume_problems(folder, config_name)
    knows_env = not any(problems.values())
    has_levels = _has_levels(config_dir, config_name)
    if has_levels and "hyperparameters" in given:
        problems["hyperparameters"] = [
            problem
            for level in given["hyperparameters"].split(",")
            for problem in _level_problems(level, config_dir, config_name, envs, folder)
        ]
    checked = [_forced(override, has_levels) for override in overrides]
    if knows_env:
        if folder is not None:
            checked = [*_resumed_overrides(folder, given), *checked]
        for env in dict(map(_split, checked)).get("env", "").split(","):
            _register(env, config_dir)
    for override in filter(_is_setting, checked):
        name, _ = _split(override)
        if not problems.get(name) and (problem := _syntax_problem(override)):
            problems[name] = [problem]
    lines = [line for each in problems.values() for line in each]
    try:
        right = [override for override in checked if not problems.get(_split(override)[0])]
        cfg = compose_settings(right, config_dir, config_name)
    except HydraException as error:
        lines.append(str(error).splitlines()[0])
    else:
        lines += find_problems(cfg, RECIPES[config_name], knows_env=knows_env)
    if lines:
        raise SettingError(one_message(lines))
    return checked


def compose_settings(overrides: Sequence[str], config_dir: Path, config_name: str) -> DictConfig:
    """Composes a recipe's config from what :func:`check_overrides` returns; a sweep has its first values."""
    parser = OverridesParser.create()
    parsed = parser.parse_overrides([each for each in overrides if _is_setting(each)])
    parsed = [parser.parse_override(_first(each)) for each in parsed if not each.is_interval_sweep()]
    settings = [each for each in parsed if each.is_force_add()]
    choices = [str(each.input_line) for each in parsed if each not in settings]
    with initialize_config_dir(str(config_dir), version_base=None):
        cfg = compose(config_name, ["++output_dir=.", *choices])
    # Hydra itself refuses a list in place of a section, and so the schema could not say what is legal.
    for override in settings:
        name, value = override.key_or_group, override.value()
        merge = isinstance(value, dict) and OmegaConf.is_dict(OmegaConf.select(cfg, name))
        OmegaConf.update(cfg, name, value, merge=merge, force_add=True)
    return cfg


def environments(config_dir: Path) -> dict[str, list[str]]:
    """The environments that can be chosen, by library: those with a YAML file, and those of installed simulators.

    Names without a task, such as ``custom``, are under ``""``.
    """
    names = {"": sorted(path.stem for path in (config_dir / "env").glob("*.yaml"))}
    for library in LIBRARIES:
        written = {path.stem for path in (config_dir / "env" / library).glob("*.yaml")}
        names[library] = [f"{library}/{task}" for task in sorted(written.union(known_tasks(library)))]
    return names


def _env_problems(envs: Sequence[str], config_dir: Path) -> Iterator[str]:
    for env in envs:
        try:
            check_name(env)
        except SimulatorError as error:
            yield str(error)
        except SettingError:
            known = [name for names in environments(config_dir).values() for name in names]
            if env not in known:
                yield f"env: {env!r}. {nearest(env, known)}"


def _syntax_problem(override: str) -> str | None:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        return (
            f"{override.lstrip('+')}: {reason}. Legal: Hydra's syntax, such as name=1.5, name=[1,2] or 'name=\"a b\"'."
        )
    return None


def _resume_problems(folder: Path, config_name: str) -> list[str]:
    if not (folder / "config.yaml").exists():
        return [f"resume: {str(folder)!r} has no config.yaml. Legal: the folder of a run, which has one."]
    algorithm = str(OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "algorithm"))
    if algorithm.lower() == config_name:
        return []
    return [f"resume: the run in {str(folder)!r} has algorithm={algorithm}. Use the recipe of {algorithm}."]


def _register(env: str, config_dir: Path) -> None:
    """Makes an environment without a YAML file a choice of Hydra's."""
    library, _, task = env.partition("/")
    if library in _ENV_DEFAULTS and not (config_dir / "env" / f"{env}.yaml").exists():
        node = {"name": env, **_ENV_DEFAULTS[library]}
        ConfigStore.instance().store(group=f"env/{library}", name=task, node=node, package="env")


def _split(override: str) -> tuple[str, str]:
    """The name and the value of an override; no value for a flag or a deletion, such as ``~critic.lr``."""
    name, _, value = override.partition("=")
    return name.lstrip("+"), value


def _is_setting(override: str) -> bool:
    """Whether an argument is a recipe's setting, rather than a flag, the value of a flag, or a setting of Hydra's."""
    return override[:1] == "~" or ("=" in override and not override.lstrip("+").startswith(("-", "hydra.", "hydra/")))


def _forced(override: str, has_levels: bool) -> str:
    """The override with ``++``, so that Hydra takes any name and the schema alone judges names."""
    name, _ = _split(override)
    is_group = name == "env" or (name == "hyperparameters" and has_levels)
    if is_group or override[:1] == "~" or not _is_setting(override):
        return override
    return f"++{override.lstrip('+')}"


def _resumed_overrides(folder: Path, given: Mapping[str, str]) -> list[str]:
    """The settings of a run as overrides, without those that are given anew."""
    record: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    overrides = [] if "env" in given else [f"env={record['env']['name']}"]
    for name, value in _leaves({name: value for name, value in record.items() if name not in _NOT_RESUMED}):
        if name not in given and not ("env" in given and name.startswith("env.")):
            overrides.append(f"++{name}={json.dumps(value)}")
    return [*overrides, f"hydra.run.dir={json.dumps(str(folder))}"]


def _leaves(settings: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _first(override: Override) -> str:
    """An override with one value, the first of a sweep."""
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def _has_levels(config_dir: Path, config_name: str) -> bool:
    """Whether a recipe has hyperparameters for all tasks and others for each."""
    return any("hyperparameters" in entry for entry in OmegaConf.load(config_dir / f"{config_name}.yaml").defaults)


def _level_problems(level: str, config_dir: Path, recipe: str, envs: Sequence[str], resumed: Path | None) -> list[str]:
    """What is wrong with the choice between hyperparameters for all tasks and those found for each."""
    if resumed is not None:
        return [f"hyperparameters={level} with resume: a run keeps its settings. Legal: to change them by name."]
    if level == "common":
        return []
    if level != "finetuned":
        return [f"hyperparameters: {level!r}. {nearest(level, ['common', 'finetuned'])}"]
    folder = config_dir / "hyperparameters" / level / recipe
    known = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    return [
        f"hyperparameters=finetuned: {recipe} has not been tuned on {env!r}. Tuned: {', '.join(known)}. Legal for "
        "other tasks: hyperparameters=common."
        for env in envs or [compose_settings([], config_dir, recipe).env.name]
        if env not in known
    ]
