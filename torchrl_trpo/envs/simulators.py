"""How each library makes an environment."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torchrl.data import MultiOneHot
from torchrl.envs import EnvBase

from torchrl_trpo.envs.compiled_vmas import CompiledVmasEnv
from torchrl_trpo.envs.replay import ReplayedGymEnv, ReplayedPettingZooWrapper
from torchrl_trpo.envs.vmas import BatchedResetVmasEnv
from torchrl_trpo.errors import SettingError, nearest


def group_agents(spaces: Mapping[str, Any], one_group: bool = False) -> dict[str, list[str]]:
    """Sorts agents into groups: one team, one kind of observation and action.

    An agent's spaces may be anything that compares equal for agents of the same kind. A group has the name of its team,
    which is the agents' name without its number. A team whose agents differ has a group for each kind, named after its
    first agent. A single group is ``"agents"``. With ``one_group`` teams do not count; it raises SettingError if the
    agents differ then.
    """
    teams: dict[str, list[list[str]]] = {}
    for agent in spaces:
        kinds = teams.setdefault("" if one_group else re.sub(r"(?<=.)_?\d+$", "", agent), [])
        alike = next((kind for kind in kinds if spaces[kind[0]] == spaces[agent]), None)
        if alike is None:
            kinds.append([agent])
        else:
            alike.append(agent)
    groups = {team if len(kinds) == 1 else kind[0]: kind for team, kinds in teams.items() for kind in kinds}
    if len(groups) == 1:
        return {"agents": list(spaces)}
    if one_group:
        raise SettingError(
            f"one_group=True: the agents {list(spaces)} cannot share one policy, because their observation or action "
            "spaces differ. Legal: one_group=False, with a policy for each group."
        )
    return groups


def _vmas(
    name: str,
    *,
    task: str,
    num_envs: int,
    kwargs: dict,
    seed: int,
    device: torch.device,
    continuous: bool | None,
    compiled: bool,
    one_group: bool,
    **unused: Any,
) -> Callable[[], EnvBase]:
    """A scenario of VMAS, vectorised. TorchRL counts its steps (max_steps=None), as VMAS terminates at time limits."""
    settings: dict[str, Any] = {
        "num_envs": num_envs,
        "device": device,
        "seed": seed,
        "max_steps": None,
        "continuous_actions": continuous is not False,
        "scenario_kwargs": kwargs,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = BatchedResetVmasEnv(task, **settings)
    for warning in caught:
        if "not used by the scenario" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            continue
        # The warning lists all arguments. A scenario pops its own from **kwargs, so only its source has their names.
        known = re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(env._env.scenario.make_world))
        (unknown, *_) = [argument for argument in kwargs if argument not in known]
        raise SettingError(f"kwargs: {unknown!r} is no argument of {name!r}. {nearest(unknown, known)}")
    simulator = env._env  # TorchRL's wrappers have no public name for what they wrap
    spaces = zip(simulator.observation_space, simulator.action_space, strict=True)
    groups = group_agents({a.name: kind for a, kind in zip(simulator.agents, spaces, strict=True)}, one_group)
    if groups == env.group_map and not compiled:
        return lambda: env
    env_class = CompiledVmasEnv if compiled else BatchedResetVmasEnv
    return functools.partial(env_class, task, **settings, group_map=groups)


def _pettingzoo(
    name: str,
    *,
    task: str,
    kwargs: dict,
    continuous: bool | None,
    one_group: bool,
    state: bool,
    render: bool,
    **unused: Any,
) -> Callable[[], EnvBase]:
    """The multi-agent particle environments, from the package ``mpe2``."""
    module = importlib.import_module(f"mpe2.{task}")
    _check_arguments(name, module.raw_env, kwargs)  # parallel_env, which calls it, takes anything
    kwargs = {"continuous_actions": bool(continuous), "max_cycles": 2**31 - 1, **kwargs}
    kwargs |= {"render_mode": "rgb_array"} if render else {}
    make = functools.partial(module.parallel_env, **kwargs)
    return functools.partial(_wrap_pettingzoo, make, _pettingzoo_groups(make(), one_group), state)


def _mamujoco(
    name: str, *, task: str, kwargs: dict, one_group: bool, state: bool, render: bool, **unused: Any
) -> Callable[[], EnvBase]:
    """Multi-agent MuJoCo, from Gymnasium-Robotics: ``kwargs["agent_conf"]`` says how the robot is divided."""
    kwargs |= {"render_mode": "rgb_array"} if render else {}
    _check_arguments(name, importlib.import_module("gymnasium_robotics").mamujoco_v1.parallel_env, kwargs, "scenario")
    kwargs = {"max_episode_steps": 2**31 - 1, **kwargs}
    make = functools.partial(_silent_mamujoco, task, **kwargs)
    return functools.partial(_wrap_pettingzoo, make, _pettingzoo_groups(make(), one_group), state)


def _gym(name: str, *, task: str, kwargs: dict, render: bool, **unused: Any) -> Callable[[], EnvBase]:
    """A single-agent task of Gymnasium."""
    kwargs |= {"render_mode": "rgb_array"} if render else {}
    # TorchRL counts the steps; a time limit inside the task would end episodes earlier.
    return functools.partial(_gym_env, task, device="cpu", max_episode_steps=2**31 - 1, **kwargs)


def _gym_env(task: str, **kwargs: Any) -> EnvBase:
    """A task with the action space that TorchRL gives it, or with indices where that has no distribution."""
    env = ReplayedGymEnv(task, **kwargs)
    for space in (env.action_space, env.observation_space):
        if np.any(getattr(space, "start", 0)):  # which TorchRL does not look at
            raise SettingError(f"env: 'gym/{task}' has the space {space}. Legal: start=0.")
    if not any(isinstance(spec, MultiOneHot) for spec in env.full_action_spec_unbatched.values(True, True)):
        return env
    env.close()
    return ReplayedGymEnv(task, categorical_action_encoding=True, **kwargs)


def _custom(
    name: str, *, num_envs: int, kwargs: dict, seed: int, device: torch.device, factory: str | None, **unused: Any
) -> Callable[[], EnvBase]:
    """The user's own TorchRL environment."""
    module, _, function = (factory or "").rpartition(".")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(
            f"factory={factory!r} cannot be imported ({error}). Legal: 'package.module.function', a function that "
            "takes kwargs and returns a torchrl EnvBase, from an installed package, the working directory or "
            "PYTHONPATH."
        ) from error
    known = {"num_envs": num_envs, "device": device, "seed": seed}
    taken = _signature(make).parameters
    known = {argument: value for argument, value in known.items() if argument in taken and argument not in kwargs}
    _check_arguments(name, make, kwargs, *known)
    return functools.partial(make, **known, **kwargs)


SIMULATORS: dict[str, Callable[..., Callable[[], EnvBase]]] = {
    "vmas": _vmas,
    "pettingzoo": _pettingzoo,
    "mamujoco": _mamujoco,
    "gym": _gym,
    "custom": _custom,
}
"""By the first part of a name: a function that returns a function that makes the environment."""


@contextlib.contextmanager
def named_construction(name: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Turns what a simulator or a factory raises into a SettingError that names the environment and its arguments.

    An error of this package, also inside torch, is a bug and passes with its traceback. Simulators raise errors of any
    type, so that only the frame that raised tells whose it is.
    """
    try:
        yield
    except (SettingError, ImportError):
        raise
    except Exception as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        packages = [module.partition(".")[0] for module in modules]
        if [each for each in packages if each not in {"torch", "tensordict", "numpy"}][-1] == "torchrl_trpo":
            raise
        # VMAS asserts without messages, so the line of code is shown
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise SettingError(
            f"env: {name!r} cannot be made with kwargs={dict(kwargs)}: {type(error).__name__}: {reason}"
        ) from error


def _signature(constructor: Callable[..., Any]) -> inspect.Signature:
    """What a function or class takes; the metaclass of TorchRL's environments hides it."""
    if isinstance(constructor, type) and issubclass(constructor, EnvBase):
        constructor = functools.partial(constructor.__init__, None)  # type: ignore[misc]
    return inspect.signature(constructor)


def _check_arguments(name: str, constructor: Callable[..., Any], kwargs: Mapping[str, Any], *given: str) -> None:
    """Refuses arguments with which a constructor cannot be called, beside the given ones."""
    signature = _signature(constructor)
    try:
        signature.bind(**dict.fromkeys(given), **kwargs)
    except TypeError as error:
        legal = [argument for argument in signature.parameters if argument not in given]
        unknown = next((argument for argument in kwargs if argument not in legal), "")
        raise SettingError(f"kwargs={dict(kwargs)} of {name!r}: {error}. {nearest(unknown, legal)}") from error


def _pettingzoo_groups(env: Any, one_group: bool) -> dict[str, list[str]]:
    agents = env.possible_agents
    spaces = {agent: (env.observation_space(agent), env.action_space(agent)) for agent in agents}
    env.close()
    return group_agents(spaces, one_group)


def _wrap_pettingzoo(make: Callable[[], Any], groups: dict[str, list[str]], state: bool) -> EnvBase:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PettingZoo in TorchRL is tested using version")
        return ReplayedPettingZooWrapper(make(), group_map=groups, return_state=state, device="cpu")


def _silent_mamujoco(robot: str, **kwargs: Any) -> Any:
    """A robot without infos. Their entries appear after the first step only, which TorchRL's wrapper cannot take."""
    from gymnasium_robotics import mamujoco_v1
    from pettingzoo.utils.wrappers import BaseParallelWrapper

    class WithoutInfos(BaseParallelWrapper):
        def reset(self, seed: int | None = None, options: dict | None = None) -> Any:
            observations, infos = super().reset(seed=seed, options=options)
            return observations, {agent: {} for agent in infos}

        def step(self, actions: dict[str, Any]) -> Any:
            *results, infos = super().step(actions)
            return *results, {agent: {} for agent in infos}

    return WithoutInfos(mamujoco_v1.parallel_env(robot, **kwargs))
