"""Checks of a recipe's settings, before anything is built."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_trpo.envs import resolve_device
from torchrl_trpo.envs.simulators import SIMULATORS, known_environments
from torchrl_trpo.errors import AgreedError, SettingError, nearest, nearest_multiples
from torchrl_trpo.keys import GroupKeys
from torchrl_trpo.numerics.updater import TrustRegionUpdater
from torchrl_trpo.parallel.minibatches import ADAM_RANGES
from torchrl_trpo.parallel.ranks import RankLostError
from torchrl_trpo.parallel.torchrun import is_first
from torchrl_trpo.reporting.loggers import BACKENDS, logger_problem

_ENV_DEFAULTS: dict[str, dict[str, Any]] = {
    "vmas": {"num_envs": 60, "max_steps": 100, "continuous_actions": True, "kwargs": {}},
    "pettingzoo": {"num_envs": 20, "max_steps": 25, "continuous_actions": False, "parallel": False, "kwargs": {}},
    "mamujoco": {"num_envs": 10, "max_steps": 1000, "parallel": False, "kwargs": {"agent_conf": "2x3"}},
    "gym": {"num_envs": 10, "max_steps": 1000, "parallel": False, "kwargs": {}},
}
_NOT_RESUMED = ("resume", "output_dir", "algorithm", "versions")
_OPEN = ("env.kwargs.", "logger.kwargs.")  # sections that take any name


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_number_in(is_legal: Callable[[Any], bool], value: object) -> bool:
    return _is_number(value) and is_legal(value)


def _is_size(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_order(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_size(index, 0) for index in value) and sorted(value) == list(range(len(value))) != []
    return value in {"random", "fixed"} if isinstance(value, str) else False


_Legal = tuple[str, Callable[[Any], bool]]
_SWITCH: _Legal = ("true or false", lambda v: isinstance(v, bool))
_OPTIONS: _Legal = ("true, false or a mapping of options", lambda v: isinstance(v, (bool, dict)))
_SIZE: _Legal = ("a whole number of at least 1", _is_size)
_SHARE: _Legal = ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_LAYERS: _Legal = (
    "a list of layer sizes such as [128,128]",
    lambda v: isinstance(v, list) and all(map(_is_size, v)),
)
_NETWORKS = ("mlp", "gru", "lstm")
_RANGES: Mapping[str, _Legal] = {
    "seed": ("a whole number from 0 to 4294967295", lambda v: _is_size(v, 0) and v < 2**32),  # NumPy's, for VMAS
    "output_dir": ("a folder", lambda v: isinstance(v, str) and v != ""),
    "resume": ("null or the folder of a run", lambda v: v is None or isinstance(v, str)),
    "film": _SWITCH,
    "chunk_size": ("null or a whole number of at least 1", lambda v: v is None or _is_size(v)),
    "compile_update": _OPTIONS,
    "normalize_observations": _SWITCH,
    "train.total_frames": _SIZE,
    "train.frames_per_batch": ("a whole number of at least 2", lambda v: _is_size(v, 2)),  # normalised over the batch
    "collector.compile_policy": _OPTIONS,
    "collector.cudagraph_policy": _OPTIONS,
    "gamma": _SHARE,
    "lmbda": _SHARE,
    "entropy_coeff": ("a number", _is_number),
    "clip_epsilon": ("a number between 0 and 1, both excluded", lambda v: _is_number(v) and 0 < v < 1),
    **{
        f"updater.{name}": (legal, functools.partial(_is_number_in, is_legal))
        for name, (legal, is_legal) in {**TrustRegionUpdater._RANGES, **ADAM_RANGES}.items()
    },
    "actor.hidden": _LAYERS,
    "critic.hidden": _LAYERS,
    "critic.value_norm": _SWITCH,
    "critic.lr": ("a number of at least 0", lambda v: _is_number(v) and v >= 0),
    "critic.epochs": _SIZE,
    "critic.minibatch_size": _SIZE,
    "critic.share_params": _SWITCH,
    "critic.agent_one_hot": _SWITCH,
    "critic.others_actions": _SWITCH,
    "checkpoint.every": _SIZE,
    "checkpoint.keep": _SIZE,
    "agent_order": ("random, fixed, or a list that names each agent's index once, such as [1,0,2]", _is_order),
    "logger.kwargs": ("a mapping of arguments such as {project: mine}", lambda v: isinstance(v, dict)),
    "env.num_envs": _SIZE,
    "env.max_steps": _SIZE,
    "env.continuous_actions": _SWITCH,
    "env.parallel": _SWITCH,
    "env.factory": (
        "'package.module.function', a function that returns a torchrl EnvBase",
        lambda v: isinstance(v, str) and "." in v.strip("."),
    ),
    "env.kwargs": ("a mapping of arguments such as {n_agents: 3}", lambda v: isinstance(v, dict)),
}
_CHOICES: Mapping[str, Sequence[str | None]] = {
    "non_finite": ("stop", "drop"),
    "actor.network": _NETWORKS,
    "actor.sharing": ("all", "group", "none"),
    "critic.network": _NETWORKS,
    "critic.inputs": ("observations", "state", "both"),
    "team_reward": ("mean", "sum", None),
    "logger.backend": (*BACKENDS, None),
}
_EXAMPLES = {"device": "a device such as auto", "env.name": "an environment such as vmas/balance"}  # by machine
_SOMETIMES = (  # in some recipes, or with a default elsewhere
    "non_finite",
    "actor.sharing",
    "critic.inputs",
    "critic.share_params",
    "critic.agent_one_hot",
    "critic.others_actions",
    "team_reward",
    "agent_order",
    "env.continuous_actions",
    "env.parallel",
)
_TRUST_REGION = {
    "chunk_size",
    "compile_update",
    "critic.value_norm",
    *map("updater.{}".format, TrustRegionUpdater._RANGES),
}
"""The settings of recipes that take trust-region steps alone."""
_CLIPPED = {"clip_epsilon", *map("updater.{}".format, ADAM_RANGES)}
"""Those of recipes that take clipped steps alone."""
_RECORDED = ("algorithm", "versions")  # a run's config.yaml says them too


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
    """Ends the command with the message alone when a setting cannot be; other errors keep their traceback.

    What the first one of several processes has told all of them, it says alone.
    """
    try:
        yield
    except SettingError as error:
        with contextlib.suppress(OSError):  # the folder that Hydra made stays only if something is in it
            Path(HydraConfig.get().runtime.output_dir).rmdir()
        sys.exit(f"error: {error}" if is_first() or not isinstance(error, AgreedError) else 1)
    except RankLostError as error:
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
        SettingError: if settings or environments are unknown, all of them in one; then also with the values that cannot
            be, as :func:`check_settings`.
    """
    environments = register_environments(config_dir)
    choices = [choice for override in overrides if override.startswith("env=") for choice in override[4:].split(",")]
    problems = [f"env: {choice!r}. {nearest(choice, environments)}" for choice in choices if choice not in environments]
    folder = next((override.partition("=")[2] for override in overrides if override.startswith("resume=")), "null")
    resumes = folder not in {"", "null"}
    if resumes and not (Path(folder) / "config.yaml").exists():
        problems.append(f"resume: {folder!r} has no config.yaml. Legal: the folder of a run, which holds one.")
    which_env = not problems  # else nobody knows what the names env.* are
    known: dict[str, Any] = {}
    checked: list[str] = []
    for override in overrides:
        name, equals, _ = override.lstrip("+").partition("=")  # Hydra would add any name with +, and nobody reads it
        if not equals or name == "env" or name.startswith(("-", "~", "hydra")):
            pass
        elif name == "hyperparameters" and _has_levels(config_dir, config_name):
            tasks = choices or [_default_env(config_dir, config_name)]
            for level in override.partition("=")[2].split(","):
                problems += _wrong_level(level, config_dir, config_name, tasks, resumes)
        elif name.startswith(_OPEN) or (f"{name}." in _OPEN and override.startswith(f"{name}={{")):
            override = f"++{override.lstrip('+')}"
        elif which_env or not name.startswith("env."):
            known = known or _defaults(config_dir, config_name, overrides if which_env else [])
            if wrong := _wrong_names(name, _parsed(override), known):
                problems += wrong
                continue
        checked.append(override)
    if resumes and which_env:
        given = [override.partition("=")[0].lstrip("+") for override in checked]
        checked = [*_resumed_overrides(Path(folder), given), *checked]
    if problems:
        values = _wrong_values(config_dir, config_name, checked) if which_env else []
        raise SettingError(_told([*problems, *values]))
    return checked


def _default_env(config_dir: Path, config_name: str) -> str:
    with initialize_config_dir(str(config_dir), version_base=None):
        return compose(config_name).env.name


def _has_levels(config_dir: Path, config_name: str) -> bool:
    """Whether a recipe has settings for all tasks and others for each."""
    return any("hyperparameters" in entry for entry in OmegaConf.load(config_dir / f"{config_name}.yaml").defaults)


def _wrong_level(level: str, config_dir: Path, recipe: str, tasks: Sequence[str], resumes: bool) -> list[str]:
    """What is wrong with the choice between settings for all tasks and those found for each."""
    if resumes:
        return [f"hyperparameters={level} with resume: a run keeps its settings. Legal: to change them by name."]
    if level == "common":
        return []
    if level != "finetuned":
        return [f"hyperparameters: {level!r}. {nearest(level, ['common', 'finetuned'])}"]
    folder = config_dir / "hyperparameters" / level / recipe
    known = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    return [
        f"hyperparameters=finetuned: {recipe} has not been tuned on {task!r}. Tuned: {', '.join(known)}. Legal for "
        "other tasks: hyperparameters=common."
        for task in tasks
        if task not in known
    ]


def _wrong_values(config_dir: Path, config_name: str, overrides: Sequence[str]) -> list[str]:
    """What is wrong with the values of overrides whose names exist."""
    overrides = ["output_dir=.", *[override for override in overrides if not override.startswith("-")]]
    with contextlib.suppress(HydraException), initialize_config_dir(str(config_dir), version_base=None):
        return list(_value_problems(_resolved(compose(config_name, overrides))).values())
    return []  # a sweep, or not Hydra's syntax: Hydra says so


def _resumed_overrides(folder: Path, given: Sequence[str]) -> list[str]:
    """The settings of a run as overrides, without those that are given anew."""
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
                _register(library, task)
    return choices


@functools.cache  # once each: a store of a hundred takes as long as composing a config
def _register(library: str, task: str) -> None:
    node = {"name": f"{library}/{task}", **_ENV_DEFAULTS[library]}
    ConfigStore.instance().store(group=f"env/{library}", name=task, node=node, package="env")


def _defaults(config_dir: Path, config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings there are by name, with the environment that the overrides choose."""
    chosen = [override.partition(",")[0] for override in overrides if override.startswith("env=")]
    folders = [Path(override.partition("=")[2]) for override in overrides if override.startswith("resume=")]
    if not chosen and folders and (folders[-1] / "config.yaml").exists():
        chosen = [f"env={OmegaConf.load(folders[-1] / 'config.yaml').env.name}"]
    return _composed(config_dir, config_name, tuple(chosen))


@functools.cache
def _composed(config_dir: Path, config_name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The settings by name, once for each environment; not to be modified."""
    with initialize_config_dir(str(config_dir), version_base=None):
        config: Any = OmegaConf.to_container(compose(config_name, list(overrides)), resolve=False)
    return dict(_settings(config))


def _wrong_names(name: str, value: Any, defaults: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names in ``name=value``, ``section={name: value}`` or ``section=[...]``."""
    names = [name]
    if isinstance(value, dict) and isinstance(defaults.get(name), dict):
        names += [inner for inner, _ in _settings(value, f"{name}.")]
    elif name in defaults and {type(value), type(defaults[name])} == {dict, list}:  # Hydra cannot merge them
        return [problem] if (problem := _setting_problem(name, value, _fields(defaults, None))) else []
    return [f"setting {each!r} does not exist. {nearest(each, defaults)}" for each in names if each not in defaults]


def _parsed(override: str) -> Any:
    """The value of an override; None for a sweep, and for what is not Hydra's syntax, which Hydra says."""
    with contextlib.suppress(HydraException):
        parsed = OverridesParser.create().parse_override(override)
        return None if parsed.is_sweep_override() else parsed.value()
    return None


def check_settings(cfg: DictConfig) -> None:
    """Checks every setting of a run: its name, type and range, and the settings against each other.

    Args:
        cfg: the recipe's config.

    Raises:
        SettingError: if settings do not exist, are missing or cannot be, alone or with others: all of them in one.
    """
    settings = _resolved(cfg)
    problems = _value_problems(settings)
    usable = {name: value for name, value in settings.items() if name not in problems}
    for names, check in _COMBINATIONS:
        if usable.keys() >= set(names) and (problem := check(*(usable[name] for name in names))):
            problems[names[0]] = problem
            del usable[names[0]]
    if problems:
        raise SettingError(_told(list(problems.values())))


def _told(problems: Sequence[str]) -> str:
    """One message for all problems; of a single one, its line alone."""
    return problems[0] if len(problems) == 1 else "\n  - ".join([f"{len(problems)} settings cannot be:", *problems])


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    """The settings of a config and its sections, by dotted name."""
    try:
        record: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SettingError(f"{error.full_key}: {str(error).splitlines()[0]}. Legal: a value.") from error
    return dict(_settings(record))


def _value_problems(settings: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with single settings, by name."""
    fields = _fields(settings, settings.get("env.name"))
    inside = tuple(f"{name}." for name in fields)  # what a mapping holds that is itself a setting's value
    problems: dict[str, str] = {}
    for name, value in settings.items():
        if name.rpartition(".")[0] in problems or name.startswith(inside) or name.partition(".")[0] in _RECORDED:
            continue
        if problem := _setting_problem(name, value, fields):
            problems[name] = problem
    sections = dict.fromkeys(section for name in fields if (section := name.rpartition(".")[0]))
    for name in [*sections, *fields]:
        needed = name not in _SOMETIMES and (name != "env.factory" or "env.name" not in problems)
        if needed and name not in settings and name.rpartition(".")[0] not in problems:
            problems[name] = f"{name} is missing. {_legal(name, fields)}"
    return problems


def _fields(settings: Mapping[str, Any], env_name: object) -> list[str]:
    """The names of all settings: of the update's those of its kind, of the environment's those that its library has."""
    clipped = "updater.max_kl" not in settings and not _CLIPPED.isdisjoint(settings)
    others = _TRUST_REGION if clipped else _CLIPPED
    fields = [field for field in [*_EXAMPLES, *_RANGES, *_CHOICES] if field not in others]
    library = str(env_name).partition("/")[0]
    if library not in SIMULATORS:
        return fields
    own = ["factory", "num_envs", "max_steps", "parallel", "kwargs"] if library == "custom" else _ENV_DEFAULTS[library]
    return [field for field in fields if not field.startswith("env.") or field[4:] in {"name", *own}]


def _setting_problem(name: str, value: Any, fields: Sequence[str]) -> str | None:
    """What is wrong with a setting or a section."""
    if any(field.startswith(f"{name}.") for field in fields):
        return None if isinstance(value, dict) else f"{name}: {_shown(value)}. {_legal(name, fields)}"
    if name not in fields:
        return f"setting {name!r} does not exist. {nearest(name, fields)}"
    if name == "device":
        return _device_problem(value)
    if name == "env.name":
        return _env_problem(value)
    if name in _CHOICES:
        ok = isinstance(value, str | None) and value in _CHOICES[name]
        return None if ok else f"{name}: {_shown(value)}. {_legal(name, fields, value)}"
    legal, is_legal = _RANGES[name]
    return None if is_legal(value) else f"{name} must be {legal}, got {_shown(value)}."


def _legal(name: str, fields: Sequence[str], given: object = "") -> str:
    """What a setting or a section may be."""
    if name in _RANGES:
        return f"Legal: {_RANGES[name][0]}."
    if name in _CHOICES:
        return nearest(given, ["null" if choice is None else choice for choice in _CHOICES[name]])
    if members := [field for field in fields if field.startswith(f"{name}.")]:
        return f"Legal: a section with {', '.join(members)}."
    return f"Legal: {_EXAMPLES[name]}."


def _device_problem(name: Any) -> str | None:
    try:
        resolve_device(name)
    except SettingError as error:
        return str(error)
    return None


def _env_problem(name: object) -> str | None:
    library, _, task = str(name).partition("/")
    if library not in SIMULATORS:
        return f"env: {_shown(name)}. {nearest(name, SIMULATORS)}"
    tasks = known_environments().get(library)  # empty where the simulator is not installed, which make_env says
    if not tasks or task in tasks:
        return None
    return f"env: {_shown(name)}. {nearest(name, [f'{library}/{other}' for other in tasks])}"


def _shown(value: object) -> str:
    """A value as a config has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _part_steps(frames: int, num_envs: int) -> str | None:
    if frames % num_envs == 0:
        return None
    return (
        f"train.frames_per_batch={frames} is not a multiple of env.num_envs={num_envs}: every environment gives "
        f"the same number of steps. Nearest: {nearest_multiples(frames, num_envs)}."
    )


def _part_batches(total: int, frames: int) -> str | None:
    if total % frames == 0:
        return None
    return (
        f"train.total_frames={total} is not a multiple of train.frames_per_batch={frames}. "
        f"Nearest: {nearest_multiples(total, frames)}."
    )


def _graph_without_gpu(cudagraph: object, device: str) -> str | None:
    if cudagraph is False or (where := resolve_device(device)).type == "cuda":
        return None
    return f"collector.cudagraph_policy=true needs device=cuda, got {where}. Legal: false."


def _nothing_recurrent(section: str, network: str, hidden: Sequence[int]) -> str | None:
    if network == "mlp" or hidden:
        return None
    return f"{section}.network={network} needs {section}.hidden, whose first layer is recurrent; got []. Legal: [128]."


def _state_of_vmas(inputs: str, env_name: str) -> str | None:
    if inputs == "observations" or not env_name.startswith("vmas/"):
        return None
    return f"env: {env_name!r} has no global state. Use critic.inputs=observations."


def _team_of_one(env_name: str, _: object) -> str | None:
    return _single_agent(env_name) if env_name.startswith("gym/") else None


def _narrow_critic(value_norm: bool, network: str, hidden: Sequence[int]) -> str | None:
    layers = hidden if network == "mlp" else hidden[1:]
    if not value_norm or 1 not in layers:
        return None
    return (
        f"critic.hidden={list(hidden)} with critic.value_norm=true: the value is the one layer with one output. Legal: "
        "hidden layers of at least 2, or critic.value_norm=false."
    )


_COMBINATIONS: Sequence[tuple[Sequence[str], Callable[..., str | None]]] = (
    # The setting to change, those that it must fit, and what says so; one that must change is not compared further.
    (("train.frames_per_batch", "env.num_envs"), _part_steps),
    (("train.total_frames", "train.frames_per_batch"), _part_batches),
    (("collector.cudagraph_policy", "device"), _graph_without_gpu),
    (("actor.network", "actor.hidden"), functools.partial(_nothing_recurrent, "actor")),
    (("critic.network", "critic.hidden"), functools.partial(_nothing_recurrent, "critic")),
    (("critic.value_norm", "critic.network", "critic.hidden"), _narrow_critic),
    (("critic.inputs", "env.name"), _state_of_vmas),
    (("logger.backend", "logger.kwargs"), logger_problem),
    (("env.name", "actor.sharing"), _team_of_one),  # ITRPO and MATRPO
    (("env.name", "team_reward"), _team_of_one),  # HATRPO and HAPPO
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
            f"env: {cfg.env.name!r} has groups of agents, {names}. Legal: the recipe of any other algorithm."
        )
    return groups[0]


def check_teams(cfg: DictConfig, groups: Sequence[GroupKeys]) -> Sequence[GroupKeys]:
    """Checks that an environment has groups of agents, and as many as ``agent_order`` orders.

    Args:
        cfg: the recipe's config.
        groups: the environment's groups.

    Returns:
        The groups.

    Raises:
        SettingError: if it has a single agent without a group, or another number of agents.
    """
    if groups[0].group is None:
        raise SettingError(_single_agent(cfg.env.name))
    order, n_agents = cfg.get("agent_order"), sum(keys.n_agents for keys in groups)
    if OmegaConf.is_list(order) and len(order) != n_agents:
        raise SettingError(
            f"agent_order={list(order)} orders {len(order)} agents, and env {cfg.env.name!r} has {n_agents}. Legal: "
            f"random, fixed, or a list of the numbers from 0 to {n_agents - 1}."
        )
    return groups


def _single_agent(env_name: str) -> str:
    return f"env: {env_name!r} has a single agent, without a group. Use the recipe trpo."
