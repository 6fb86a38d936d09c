"""The overrides of a command line, as Hydra takes them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_trpo.config.schema import RECIPES
from torchrl_trpo.config.validation import RECORDED, find_problems, one_message
from torchrl_trpo.envs.tasks import LIBRARIES, SimulatorError, check_name, known_tasks
from torchrl_trpo.errors import SettingError, nearest
from torchrl_trpo.reporting.record import read_config

_ENV_DEFAULTS: dict[str, dict[str, Any]] = {
    "vmas": {"num_envs": 60, "max_steps": 100, "continuous_actions": True, "compiled": "auto", "kwargs": {}},
    "pettingzoo": {"num_envs": 20, "max_steps": 25, "continuous_actions": False, "parallel": False, "kwargs": {}},
    "mamujoco": {"num_envs": 10, "max_steps": 1000, "parallel": False, "kwargs": {"agent_conf": "2x3"}},
    "gym": {"num_envs": 10, "max_steps": 1000, "parallel": False, "kwargs": {}},
}
"""The settings of environments without a YAML file, by library."""
_NOT_RESUMED = ("resume", "output_dir", *RECORDED)


def compose_settings(overrides: Sequence[str], config_dir: Path, config_name: str) -> tuple[DictConfig, list[str]]:
    """Composes a recipe's config from a command line, and checks it: names, values, and settings against each other.

    In a sweep, each value of a setting is checked, together with the first values of the others.

    Args:
        overrides: the arguments of the command line, such as ``["updater.max_kl=0.02"]``.
        config_dir: the folder of the configs.
        config_name: the recipe's config.

    Returns:
        The config, which has the first values of a sweep, and ``output_dir`` ``"."`` if none is given; and the
        overrides with which Hydra composes it. With ``resume=<folder>``, the settings of that run come before.

    Raises:
        SettingError: if settings or environments are unknown, missing or invalid; it lists all of them.
    """
    given = dict(map(_split, overrides))
    envs = given["env"].split(",") if "env" in given else []
    folder = _folder("resume", given)
    problems = {"env": list(_env_problems(envs, config_dir))}
    for flag in ("--config-name", "-cn", "--config-path", "-cp"):
        if flag in given:
            problems[flag] = [f"{flag}: a recipe has one config. Legal: the recipe of another algorithm."]
    if "~env" in given:
        problems["~env"] = ["~env: a run needs an environment. Legal: env=<library>/<task>."]
    for name in given:
        if name.partition(".")[0] in RECORDED:
            problems[name] = [f"setting {name!r} does not exist: a run writes it down. Legal: what --help lists."]
    if folder is not None and _is_sweep(f"resume={given['resume']}"):
        problems["resume"] = [f"resume={given['resume']}: a sweep resumes no runs. Legal: one folder."]
    elif folder is not None:
        problems["resume"] = _resume_problems(folder, config_name, _folder("output_dir", given))
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
            first = next(index for index, override in enumerate(checked) if _is_setting(override))  # after the flags
            checked[first:first] = _resumed_overrides(folder, given)
        for env in dict(map(_split, checked)).get("env", "").split(","):
            _register(env, config_dir)
    for override in filter(_is_setting, checked):
        name, _ = _split(override)
        if not problems.get(name) and (problem := _syntax_problem(override)):
            problems[name] = [problem]
    lines = [line for each in problems.values() for line in each]
    try:
        right = [override for override in checked if not problems.get(_split(override)[0])]
        cfg = _compose(right, config_dir, config_name)
    except (HydraException, OmegaConfBaseException) as error:
        lines.append(str(error).splitlines()[0])
    else:
        lines += find_problems(cfg, RECIPES[config_name], knows_env=knows_env, together=not problems.get("resume"))
        if not lines:
            lines += _sweep_problems(right, cfg, config_name)
    if lines:
        raise SettingError(one_message(lines))
    return cfg, checked


def typed(name: str, folder: Path) -> str:
    """A setting that is a folder, as it is typed in a shell."""
    override = f"{name}={folder}"
    if _syntax_problem(override) or OverridesParser.create().parse_override(override).value() != str(folder):
        override = f"{name}={written(str(folder))}"
    return shlex.quote(override)


def written(value: Any) -> str:
    """A value in Hydra's syntax of overrides, also a list or a mapping."""

    def quoted(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: quoted(each) for name, each in value.items()}
        if isinstance(value, list):
            return [quoted(each) for each in value]
        return QuotedString(value, Quote.double) if isinstance(value, str) else value

    return Override(OverrideType.CHANGE, "", ValueType.ELEMENT, quoted(value)).get_value_element_as_str()


def environments(config_dir: Path) -> dict[str, list[str]]:
    """The environments that can be chosen, by library: those with a YAML file, and those of installed simulators.

    Names without a task, such as ``custom``, are under ``""``.
    """
    names = {"": sorted(path.stem for path in (config_dir / "env").glob("*.yaml"))}
    for library in LIBRARIES:
        written = {path.stem for path in (config_dir / "env" / library).glob("*.yaml")}
        names[library] = [f"{library}/{task}" for task in sorted(written.union(known_tasks(library)))]
    return names


def _compose(overrides: Sequence[str], config_dir: Path, config_name: str) -> DictConfig:
    """Composes a recipe's config from overrides with ``++``; a sweep has its first values."""
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


def _folder(name: str, given: Mapping[str, str]) -> Path | None:
    """The folder that a setting names; None if it names none."""
    override = f"{name}={given.get(name, 'null')}"
    if _syntax_problem(override):
        return None
    value = given[name] if _is_sweep(override) else OverridesParser.create().parse_override(override).value()
    return None if value is None or value == "" else Path(str(value))


def _is_sweep(override: str) -> bool:
    return OverridesParser.create().parse_override(override).is_sweep_override()


def _resume_problems(folder: Path, config_name: str, output_dir: Path | None) -> list[str]:
    try:
        algorithm = str(read_config(folder, "resume")["algorithm"])
    except SettingError as error:
        return [str(error)]
    if algorithm.lower() != config_name:
        return [f"resume: the run in {str(folder)!r} has algorithm={algorithm}. Use the recipe of {algorithm}."]
    if output_dir is not None and output_dir.resolve() != folder.resolve():
        return [
            f"output_dir={output_dir} with resume={folder}: a run goes on in its folder. Legal: without output_dir."
        ]
    return []


def _sweep_problems(overrides: Sequence[str], cfg: DictConfig, config_name: str) -> Iterator[str]:
    """Yields what is wrong with each value of a sweep, beside the first values of the others."""
    for override in OverridesParser.create().parse_overrides([each for each in overrides if _is_setting(each)]):
        if override.is_discrete_sweep() and override.is_force_add():
            for text in override.sweep_string_iterator():
                value = OverridesParser.create().parse_override(f"{override.get_key_element()}={text}").value()
                other = cfg.copy()
                OmegaConf.update(other, override.key_or_group, value, force_add=True)
                yield from find_problems(other, RECIPES[config_name])


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
    record = read_config(folder)
    overrides = [] if "env" in given else [f"env={record['env']['name']}"]
    for section, settings in record.items():
        named = {f"{section}.{name}": value for name, value in settings.items()} if isinstance(settings, dict) else {}
        for name, value in (named or {section: settings}).items():
            if section in _NOT_RESUMED or name in given or ("env" in given and section == "env"):
                continue
            if isinstance(value, dict):
                overrides.append(f"~{name}")  # Hydra would merge the mapping with the default one
            overrides.append(f"++{name}={written(value)}")
    return [*overrides, f"hydra.run.dir={written(str(folder))}"]


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
        for env in envs or [_compose([], config_dir, recipe).env.name]
        if env not in known
    ]
