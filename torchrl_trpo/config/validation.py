"""Checks of a recipe's settings before anything is built: all problems at once, each with what is legal."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from torchrl_trpo.config.schema import RECIPES, Recipe
from torchrl_trpo.envs import resolve_device
from torchrl_trpo.errors import SettingError, close_names, did_you_mean, nearest, nearest_multiples
from torchrl_trpo.keys import GroupKeys
from torchrl_trpo.reporting.loggers import logger_problem

_ARGUMENTS = {  # of make_env and make_collector, in their errors, and the settings that they come from
    r"(num_envs|max_steps|kwargs|factory)(?=[=:]| must)": r"env.\1",
    r"one_group=True": "actor.sharing=all",
    r"one_group=False": "actor.sharing=group or none",
    r"state=True": "critic.inputs",
    r"state=False": "critic.inputs=observations",
    r"cudagraph_policy=True": "collector.cudagraph_policy=true",
    r"cudagraph_policy=False": "collector.cudagraph_policy=false",
}
RECORDED = ("algorithm", "versions")
"""What the ``config.yaml`` of a run has besides its settings."""


def check_settings(cfg: DictConfig, recipe: type[Recipe]) -> None:
    """Checks every setting of a run: its name, type and range, and the settings against each other.

    Args:
        cfg: the recipe's config.
        recipe: the recipe's settings, one of ``torchrl_trpo.config.schema.RECIPES``.

    Raises:
        SettingError: if settings are unknown, missing or invalid, alone or together; it lists all of them.
    """
    if problems := find_problems(cfg, recipe):
        raise SettingError(one_message(problems))


def one_message(problems: Sequence[str]) -> str:
    """One message for all problems, of which there is at least one."""
    first = [f"{len(problems)} settings are wrong:"] if len(problems) > 1 else []
    return "\n  - ".join([*first, *problems])


def find_problems(cfg: DictConfig, recipe: type[Recipe], *, knows_env: bool = True, together: bool = True) -> list[str]:
    """Finds what is wrong with settings, a line for each problem.

    Where the environment is not known, the section ``env`` may hold anything. Without ``together`` the settings are not
    checked against each other.
    """
    try:
        record: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        return [f"{error.full_key}: {str(error).splitlines()[0]}. Legal: a value."]
    settings = {name: value for name, value in record.items() if name not in RECORDED}
    library = None
    if knows_env:
        env = settings.get("env")
        library = str(env.get("name") if isinstance(env, Mapping) else env).partition("/")[0]
    else:
        settings.pop("env", None)
    model = recipe.of_library(library)
    known = dict(fields(model))
    problems: dict[str, str] = {}
    try:
        model.model_validate(settings)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = ".".join(map(str, detail["loc"]))
            if detail["type"] == "extra_forbidden":
                problems[name] = _unknown(name, known, _value(settings, name))
                continue
            while name not in known and not _parts(name, known):  # pydantic's place may go on inside the value
                name = name.rpartition(".")[0]
            cause = detail.get("ctx", {}).get("error")
            if isinstance(cause, SettingError):
                problems[name] = str(cause)
            elif detail["type"] == "missing":
                problems[name] = f"{name} is missing. {_legal(name, known)}"
            else:
                problems[name] = _wrong_value(name, known, _value(settings, name))
    usable = {name: _value(settings, name) for name in known if not _has_problem(name, problems)}
    for names, check in _COMBINATIONS if together else ():
        if usable.keys() >= set(names) and (problem := check(*(usable[name] for name in names))):
            problems[names[0]] = problem
            del usable[names[0]]
    return list(problems.values())


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields the dotted name and the field of each setting of a model."""
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def choices(field: FieldInfo) -> list[str]:
    """The legal values of a setting that is a choice, as they are typed on the command line; none for any other."""
    if field.title:
        return []
    members = get_args(field.annotation) if get_origin(field.annotation) is not Literal else [field.annotation]
    values = [value for member in members for value in get_args(member)]
    return [*values, "null"] if type(None) in members else values


def _parts(section: str, known: Iterable[str]) -> list[str]:
    """The settings in a section; none if there is no such section."""
    return [name for name in known if name.startswith(f"{section}.")]


def _value(settings: Any, name: str) -> Any:
    return functools.reduce(lambda section, part: section.get(part), name.split("."), settings)


def _has_problem(name: str, problems: Mapping[str, str]) -> bool:
    return any(f"{name}.".startswith(f"{place}.") for place in problems)


def _wrong_value(name: str, known: Mapping[str, FieldInfo], value: object) -> str:
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    if name in known and known[name].title:
        return f"{name} must be {known[name].title}, got {shown}."
    return f"{name}: {shown}. {_legal(name, known, value)}"


def _unknown(name: str, known: Mapping[str, FieldInfo], value: object) -> str:
    """What to type instead of a setting that does not exist."""
    while isinstance(value, Mapping) and len(value) == 1:  # of a section that does not exist
        ((part, value),) = value.items()
        name = f"{name}.{part}"
    said = f"setting {name!r} does not exist."
    section, _, last = name.rpartition(".")
    legal = [each for each in known if each.rpartition(".")[0] == section]
    if others := [recipe for recipe, model in RECIPES.items() if name in dict(fields(model))]:
        return f"{said} It is one of {', '.join(others)}. {nearest('', legal)}"
    alike: dict[str, list[str]] = {}  # by their names without the section
    for each in legal if section and legal else known:
        alike.setdefault(each.rpartition(".")[2], []).append(each)
    close = alike.get(last) or [each for word in close_names(last, alike) for each in alike[word]]
    if close or not (section and legal):
        return f"{said} {did_you_mean(close)}Legal: what --help lists."
    return f"{said} {nearest('', legal)}"


def _legal(name: str, known: Mapping[str, FieldInfo], value: object = "") -> str:
    """What a setting or a section may be, as a sentence."""
    if name not in known:
        return f"Legal: a section with {', '.join(_parts(name, known))}."
    return f"Legal: {known[name].title}." if known[name].title else nearest(value, choices(known[name]))


def _frames_of_each_environment(frames: int, num_envs: int) -> str | None:
    if frames % num_envs == 0:
        return None
    return (
        f"train.frames_per_batch={frames} is not a multiple of env.num_envs={num_envs}: every environment gives "
        f"the same number of steps. Nearest: {nearest_multiples(frames, num_envs)}."
    )


def _whole_batches(total: int, frames: int) -> str | None:
    if total % frames == 0:
        return None
    return (
        f"train.total_frames={total} is not a multiple of train.frames_per_batch={frames}. "
        f"Nearest: {nearest_multiples(total, frames)}."
    )


def _graph_needs_gpu(cudagraph: object, device: str) -> str | None:
    if cudagraph is False or (where := resolve_device(device)).type == "cuda":
        return None
    return f"collector.cudagraph_policy=true needs device=cuda, got {where}. Legal: false."


def _recurrent_layer(section: str, network: str, hidden: Sequence[int]) -> str | None:
    if network == "mlp" or hidden:
        return None
    return f"{section}.network={network} needs {section}.hidden, whose first layer is recurrent; got []. Legal: [128]."


def _one_output(value_norm: bool, network: str, hidden: Sequence[int]) -> str | None:
    layers = hidden if network == "mlp" else hidden[1:]
    if not value_norm or 1 not in layers:
        return None
    return (
        f"critic.hidden={list(hidden)} with critic.value_norm=true: the value is the one layer with one output. Legal: "
        "hidden layers of at least 2, or critic.value_norm=false."
    )


def _state_of_vmas(inputs: str, env_name: str) -> str | None:
    if inputs == "observations" or not env_name.startswith("vmas/"):
        return None
    return f"env: {env_name!r} has no global state. Use critic.inputs=observations."


def _team(env_name: str, _: object) -> str | None:
    return _single_agent(env_name) if env_name.startswith("gym/") else None


_COMBINATIONS: Sequence[tuple[Sequence[str], Callable[..., str | None]]] = (
    # The setting to change, the settings that it must fit, and the check. A setting with a problem is not compared.
    (("train.frames_per_batch", "env.num_envs"), _frames_of_each_environment),
    (("train.total_frames", "train.frames_per_batch"), _whole_batches),
    (("collector.cudagraph_policy", "device"), _graph_needs_gpu),
    (("actor.network", "actor.hidden"), functools.partial(_recurrent_layer, "actor")),
    (("critic.network", "critic.hidden"), functools.partial(_recurrent_layer, "critic")),
    (("critic.value_norm", "critic.network", "critic.hidden"), _one_output),
    (("critic.inputs", "env.name"), _state_of_vmas),
    (("logger.backend", "logger.kwargs"), logger_problem),
    (("env.name", "actor.sharing"), _team),  # of ITRPO, MATRPO, MAPPO and IPPO
    (("env.name", "team_reward"), _team),  # of HATRPO and HAPPO
)


def in_terms_of_settings(message: str) -> str:
    """An error about arguments in the terms of a recipe: ``env.num_envs=5`` for ``num_envs=5``."""
    for argument, setting in _ARGUMENTS.items():
        message = re.sub(rf"(?<![\w.]){argument}", setting, message)
    return message


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
    """Checks that an environment has groups of agents, and that ``agent_order`` has their number.

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
            f"random, fixed, greedy (HATRPO alone), or a list of the numbers from 0 to {n_agents - 1}."
        )
    return groups


def _single_agent(env_name: str) -> str:
    return f"env: {env_name!r} has a single agent, without a group. Use the recipe trpo."
