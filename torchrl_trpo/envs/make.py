"""Environments for the recipes: one vectorised TorchRL environment from a name, agents sorted into groups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchrl._utils import logger
from torchrl.envs import (
    Compose,
    DTypeCastTransform,
    EnvBase,
    InitTracker,
    RewardSum,
    SerialEnv,
    StepCounter,
    Transform,
    TransformedEnv,
)

from torchrl_trpo.envs.absent_agents import WithoutAbsent
from torchrl_trpo.envs.checks import check_seed, check_specs
from torchrl_trpo.envs.normalization import ObservationNorm
from torchrl_trpo.envs.parallel_env import RestorableParallelEnv
from torchrl_trpo.envs.simulators import SIMULATORS, named_construction
from torchrl_trpo.envs.tasks import check_name
from torchrl_trpo.errors import SettingError, nearest_multiples
from torchrl_trpo.keys import agent_groups, group_keys, return_key
from torchrl_trpo.parallel.ranks import ALONE, Ranks
from torchrl_trpo.seeding import rank_seed


def make_env(
    name: str,
    *,
    num_envs: int,
    max_steps: int,
    seed: int,
    device: torch.device | str,
    kwargs: Mapping[str, Any] | None = None,
    continuous_actions: bool | None = None,
    compiled: bool = False,
    factory: str | None = None,
    parallel: bool = False,
    one_group: bool = False,
    state: bool = False,
    render: bool = False,
    normalize_observations: bool = False,
    ranks: Ranks = ALONE,
) -> EnvBase:
    """Builds a vectorised environment.

    Agents that may share a policy form a group: those of one team (the same name up to its number) with the same
    observation and action space; if all agents are one group, it is called ``"agents"``. Observations are
    ``(group, "observation")`` ``[num_envs, n_agents, F]``; a single-agent environment has no groups, and
    ``"observation"`` ``[num_envs, F]``.

    Time limits are counted here: a step at which ``max_steps`` ran out is ``truncated`` and not ``terminated``, and so
    is bootstrapped. The running return is in ``("next", group, "episode_reward")``.

    TorchRL's ``check_env_specs`` checks one environment, or the batch, before it is used; a failure is an
    :class:`~torchrl_trpo.envs.checks.EnvironmentFault`. The state of Gym's, PettingZoo's and MuJoCo's environments is
    in ``env.base_env.state_dict()``, see :class:`~torchrl_trpo.envs.replay.Replayed`.

    Args:
        name: ``"vmas/<scenario>"``, ``"pettingzoo/<task>"``, ``"mamujoco/<robot>"``, ``"gym/<id>"``, or ``"custom"``.

    Keyword Args:
        num_envs: the number of environments in the batch.
        max_steps: the time limit, in steps.
        seed: the seed of the environments' randomness.
        device: where the environments' data are. Simulators other than VMAS compute on the CPU, one environment at a
            time, and their data are moved; a factory's batch is where the factory makes it, ``env.device``.
        kwargs: the simulator's own arguments. Default: none.
        continuous_actions: whether actions are continuous, where the simulator offers both; discrete ones are
            categorical. Those of Gymnasium are one-hot, as TorchRL's ``GymEnv`` gives them.
        compiled: whether VMAS's simulator is compiled, see :class:`~torchrl_trpo.envs.CompiledVmasEnv`.
        factory: for ``"custom"``: where the function is that makes the environment, ``"package.module.function"``. It
            is called with ``kwargs``, and with ``num_envs``, ``device`` and ``seed`` if it takes them, and gives one
            environment or a batch of ``num_envs``.
        parallel: whether environments that are not vectorised themselves get a process each (TorchRL's
            ``ParallelEnv``), or run one after the other.
        one_group: whether all agents are put in one group, whatever their team.
        state: whether the environment must give a global ``"state"`` ``[num_envs, S]``.
        render: whether the environments must be able to draw themselves.
        normalize_observations: whether observations are normalised with running statistics (TorchRL's ``VecNormV2``).
        ranks: the processes that the environments are spread over: each has as many, with random numbers of its own.
            Default: this one alone.

    Returns:
        The environment, batch size ``[num_envs]``, of several ranks this one's share of it.

    Raises:
        SettingError: if the name or an argument is unknown, the simulator is not installed or refuses its arguments, a
            size is not positive, or there is no such state.
    """
    check_name(name)
    library, _, task = name.partition("/")
    for argument, value in {"num_envs": num_envs, "max_steps": max_steps}.items():
        if value < 1:
            raise SettingError(f"{argument} must be at least 1, got {value}.")
    if ranks.size > 1:
        if num_envs % ranks.size:
            raise SettingError(
                f"num_envs={num_envs} cannot be spread over {ranks.size} processes. Nearest: "
                f"{nearest_multiples(num_envs, ranks.size)}."
            )
        num_envs, seed = num_envs // ranks.size, rank_seed(seed, ranks.rank)
    kwargs, device = dict(kwargs or {}), torch.device(device)
    if device.type != "cpu" and device.index is None:  # tensors have an index, and TorchRL compares devices
        device = torch.device(device.type, torch.accelerator.current_device_index())

    with named_construction(name, kwargs):
        construct = SIMULATORS[library](
            name,
            task=task,
            num_envs=num_envs,
            kwargs=kwargs,
            seed=seed,
            device=device,
            continuous=continuous_actions,
            compiled=compiled,
            factory=factory,
            one_group=one_group,
            state=state,
            render=render,
        )
        make = functools.partial(_make_one, construct, factory)
        env = make()
        _check_entries(env, name)

    if env.batch_size not in ((), (num_envs,)):
        raise SettingError(
            f"env: {name!r} has batch size {tuple(env.batch_size)}. Legal: (), or (num_envs,) = ({num_envs},)."
        )
    if one_group and len(groups := agent_groups(env)) > 1:
        raise SettingError(
            f"one_group=True: {name!r} has the groups {list(groups)}. Legal: one_group=False, with a policy for each."
        )
    if state and "state" not in env.observation_spec.keys():
        raise SettingError(
            f"state=True: {name!r} has no global state. Legal: state=False, with critics of observations."
        )
    _warn_of_own_statistics(env)
    check_specs(env, name, seed)
    if library == "custom":
        check_seed(env, seed)

    if not env.batch_size:
        env.close(raise_if_closed=False)
        batched = RestorableParallelEnv if parallel else SerialEnv
        env = batched(num_envs, make, device=device)
    # not unwrapped: base_env is the environment that the factory made, which has the state to save
    transforms = Compose(*_transforms(env, max_steps, normalize_observations))
    env = TransformedEnv(env, transforms, auto_unwrap=False)
    env.set_seed(seed)
    return env


def _make_one(construct: Callable[[], EnvBase], factory: str | None) -> EnvBase:
    """Makes an environment with the device of its specs: TorchRL moves data only for one that has a device."""
    env = construct()
    if not isinstance(env, EnvBase):
        raise SettingError(f"factory={factory!r} gave a {type(env).__name__}. Legal: a torchrl EnvBase.")
    devices = [spec.device for spec in env.full_observation_spec.values(True, True) if spec.device is not None]
    env = env.to(devices[0]) if env.device is None and devices else env
    if isinstance(env, TransformedEnv):
        _save_simulator_too(env)
    return env


def _save_simulator_too(env: TransformedEnv) -> None:
    """Puts the simulator into the state of a factory's environment, where TorchRL has that of the transforms alone."""
    transform, simulator = env.transform, env.base_env
    if isinstance(simulator, TransformedEnv):
        _save_simulator_too(simulator)

    def state_dict() -> dict[str, Any]:
        return {"transforms": transform.state_dict(), "simulator": simulator.state_dict()}

    def load_state_dict(state: Mapping[str, Any], **kwargs: Any) -> None:
        transform.load_state_dict(state["transforms"], **kwargs)
        simulator.load_state_dict(state["simulator"], **kwargs)

    vars(env).update(state_dict=state_dict, load_state_dict=load_state_dict)


def _warn_of_own_statistics(env: EnvBase) -> None:
    """Warns of a factory's transforms that learn something, such as VecNormV2: it is not saved with the policy."""
    for part in env.transform.modules() if isinstance(env, TransformedEnv) else ():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            logger.warning(
                f"env: the factory's {type(part).__name__} has statistics of its own, which are not saved with "
                "the policy: evaluate, load_policy and films begin new ones. For observations use "
                "normalize_observations=true."
            )


def _check_entries(env: EnvBase, name: str) -> None:
    """Refuses an environment whose entries are not where the recipes read them."""
    keys = group_keys(env)[0]
    observed = list(env.full_observation_spec_unbatched.keys(True, True))
    if name.startswith("gym/") and not {keys.observation, keys.action_mask}.issuperset(observed):
        raise SettingError(
            f"env: {name!r} observes {observed}. Legal: one entry; join them with TorchRL's CatTensors in a factory of "
            "your own, name='custom'."
        )


def _transforms(env: EnvBase, max_steps: int, normalize_observations: bool) -> list[Transform]:
    groups = group_keys(env)
    observations = [keys.observation for keys in groups]
    spec = env.full_observation_spec_unbatched
    rewards = list(env.reward_keys)
    returns = [return_key(key) for key in rewards]
    masks = {keys.observation: keys.mask for keys in groups if keys.mask is not None}
    absent = [WithoutAbsent(groups)] if masks else []
    transforms = [InitTracker(), StepCounter(max_steps), *absent, RewardSum(in_keys=rewards, out_keys=returns)]
    read = [*observations, *(["state"] if "state" in spec.keys() else [])]
    for dtype in dict.fromkeys(spec[key].dtype for key in read):
        if dtype != torch.float32:
            of_dtype = [key for key in read if spec[key].dtype == dtype]
            transforms.append(DTypeCastTransform(dtype, torch.float32, in_keys=of_dtype))
    if normalize_observations:
        transforms.append(ObservationNorm(observations, masks))
    return transforms
