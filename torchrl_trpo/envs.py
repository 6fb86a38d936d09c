"""Environments for the recipes, built from their config."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torchrl.envs import Compose, EnvBase, MarlGroupMapType, RewardSum, StepCounter, TransformedEnv, VmasEnv

from torchrl_trpo.suggest import SettingError, nearest

GROUP = "agents"
"""The group that holds all agents."""


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for.

    Args:
        name: ``"auto"`` (CUDA if there is a GPU, else CPU), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns:
        The device.

    Raises:
        SettingError: if the name is unknown or the device is not there.
    """
    n_gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if n_gpus else "cpu")
    legal = ["auto", "cpu", *(["cuda"] if n_gpus else []), *(f"cuda:{index}" for index in range(n_gpus))]
    if name not in legal:
        raise SettingError(f"device: {name!r} is not there, this machine has {n_gpus} GPUs. {nearest(name, legal)}")
    return torch.device(name)


def make_env(
    name: str,
    *,
    num_envs: int,
    max_steps: int,
    kwargs: Mapping[str, Any],
    seed: int,
    device: torch.device,
    continuous_actions: bool = True,
) -> EnvBase:
    """Builds a vectorised environment with all agents in the group ``"agents"``.

    Time limits are counted outside of VMAS, which reports them as terminations: a step at which ``max_steps`` ran out
    is ``truncated`` and not ``terminated``, and so is bootstrapped. The running return is in
    ``("next", "agents", "episode_reward")``.

    Args:
        name: ``"vmas/<scenario>"``.

    Keyword Args:
        num_envs: the number of environments in the batch.
        max_steps: the time limit, in steps.
        kwargs: the scenario's own arguments.
        seed: the seed of the environments' randomness.
        device: where the environments live.
        continuous_actions: whether actions are continuous; discrete ones are categorical.

    Returns:
        The environment, batch size ``[num_envs]``.

    Raises:
        SettingError: if the scenario or an argument of it is unknown, its agents differ in their spaces, or a size is
            not positive.
        ImportError: if VMAS is not installed.
    """
    library, _, scenario = name.partition("/")
    if not VmasEnv.available_envs:
        raise ImportError("VMAS is not installed. Use: pip install torchrl-trpo[vmas,recipes].")
    if library != "vmas" or scenario not in VmasEnv.available_envs:
        raise SettingError(f"env: {name!r}. {nearest(name, [f'vmas/{known}' for known in VmasEnv.available_envs])}")
    for setting, value in {"env.num_envs": num_envs, "env.max_steps": max_steps}.items():
        if value < 1:
            raise SettingError(f"{setting} must be at least 1, got {value}.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = VmasEnv(
            scenario,
            num_envs=num_envs,
            device=device,
            seed=seed,
            max_steps=None,
            continuous_actions=continuous_actions,
            group_map=MarlGroupMapType.ALL_IN_ONE_GROUP,
            scenario_kwargs=dict(kwargs),
        )
    for warning in caught:
        if "not used by the scenario" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            continue
        known = re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(env._env.scenario.make_world))
        (unknown, *_) = [name for name in kwargs if name not in known]
        raise SettingError(f"env.kwargs.{unknown} is no argument of {name!r}. {nearest(unknown, known)}")
    if env.het_specs:
        raise SettingError(
            f"env: {name!r} has agents with different observation or action spaces; one group cannot hold them."
        )
    env = TransformedEnv(
        env,
        Compose(StepCounter(max_steps), RewardSum(in_keys=[(GROUP, "reward")], out_keys=[(GROUP, "episode_reward")])),
    )
    env.set_seed(seed)
    return env
