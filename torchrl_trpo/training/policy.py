"""The environment and the policy of a run: making them, and loading a trained policy from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.envs import Compose, DTypeCastTransform, EnvBase, Transform

from torchrl_trpo.envs import make_env, resolve_device
from torchrl_trpo.envs.normalization import TransformState, observation_norm
from torchrl_trpo.errors import SettingError
from torchrl_trpo.keys import GroupKeys, group_keys
from torchrl_trpo.networks import make_actor
from torchrl_trpo.parallel.ranks import Ranks
from torchrl_trpo.seeding import untouched_generators
from torchrl_trpo.training.checkpoints import find_checkpoint, load_components, read_record


def make_policy(
    env: EnvBase,
    groups: Sequence[GroupKeys],
    *,
    sharing: str = "none",
    hidden: Sequence[int] = (128, 128),
    network: str = "mlp",
) -> TensorDictModuleBase:
    """Makes the policy of all groups of agents, as the recipes train it.

    Args:
        env: the environment.
        groups: its groups.

    Keyword Args:
        sharing: ``"none"`` for one network per agent; with ``"group"`` or ``"all"`` the agents of a group share one.
        hidden: the sizes of the hidden layers.
        network: ``"mlp"``, ``"gru"`` or ``"lstm"``, see :func:`~torchrl_trpo.networks.make_actor`.

    Returns:
        The actors of the groups in sequence, or a single agent's actor. They read observations ``[*B, n_agents, F]``
        and write actions ``[*B, n_agents, A]`` with their log-probabilities ``[*B, n_agents]``.
    """
    settings: dict[str, Any] = {"share_params": sharing != "none", "hidden": hidden, "network": network}
    actors = [make_actor(env, keys, **settings) for keys in groups]
    return actors[0] if groups[0].group is None else TensorDictSequential(*actors)


_STEPS_THAT_PAY = 1000
"""From how many steps of the vectorised environment on compiling takes less time than it saves."""


def settle_compilation(cfg: Any) -> Any:
    """Decides whether a run is compiled, where its settings leave it open.

    A run that is resumed has the decision in its settings, so that it goes on as it began.

    Args:
        cfg: the recipe's config.

    Returns:
        The config, with ``env.compiled`` true or false in the place of ``auto``.
    """
    if cfg.env.get("compiled") != "auto":
        return cfg
    n_steps = cfg.train.total_frames // cfg.env.num_envs
    pays = n_steps >= _STEPS_THAT_PAY and resolve_device(cfg.device).type == "cpu"
    settled = copy.deepcopy(cfg)
    settled.env.compiled = pays
    return settled


def make_training_env(cfg: Mapping[str, Any], ranks: Ranks) -> EnvBase:
    """Makes the environment that a recipe trains in, with :func:`~torchrl_trpo.envs.make_env`.

    Args:
        cfg: the recipe's config.
        ranks: the processes that the environments are spread over.

    Returns:
        The environment, batch size ``[num_envs]``, of several ranks this one's share of it.
    """
    return make_env(
        **_env_settings(cfg),
        seed=cfg["seed"],
        device=resolve_device(cfg["device"]),
        normalize_observations=cfg["normalize_observations"],
        ranks=ranks,
    )


def make_run_env(
    config: Mapping[str, Any],
    *,
    num_envs: int,
    seed: int,
    device: torch.device,
    parallel: bool = False,
    render: bool = False,
    normalize_observations: bool = False,
) -> EnvBase:
    """Makes the environment of a run again.

    Args:
        config: the run's settings, as in its ``config.yaml``.

    Keyword Args:
        num_envs: the number of environments; a factory that can only make the run's number makes that.
        seed: the seed of the environments' randomness.
        device: the device of the data, as for :func:`~torchrl_trpo.envs.make_env`.
        parallel: whether environments that are not vectorised get a process each.
        render: whether the environments must be able to draw themselves.
        normalize_observations: whether observations are normalised; False for a policy of :func:`on_raw_observations`.

    Returns:
        The environment, batch size ``[num_envs]``.

    Raises:
        SettingError: if it cannot be made.
    """
    settings = {
        **_env_settings(config),
        "parallel": parallel,
        "seed": seed,
        "device": device,
        "render": render,
        "normalize_observations": normalize_observations,
        "compiled": False,  # which takes longer than the steps of an evaluation
    }
    try:
        return make_env(**{**settings, "num_envs": num_envs})
    except SettingError:
        if config["env"]["name"] != "custom":
            raise
    return make_env(**settings)


def _env_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``make_env`` that decide on the environment's entries and dynamics."""
    return {
        **config["env"],
        "one_group": config["actor"].get("sharing") == "all",
        "state": config["critic"].get("inputs", "observations") != "observations",
    }


def load_policy(
    run_folder: str | Path, checkpoint: str = "latest", device: str | torch.device | None = None
) -> TensorDictModuleBase:
    """Loads the trained policy of a run, for any environment with the same entries and specs.

    It reads each group's ``(group, "observation")`` ``[*B, n_agents, F]`` as the environment gives it, and a single
    agent's ``"observation"`` ``[*B, F]``. If the run normalised observations, the policy does it with the run's
    statistics, which no longer move. If discrete actions are masked, it also reads ``(group, "action_mask")``. It
    writes ``(group, "action")``, its log-probability ``(group, "action_log_prob")`` and the distribution's parameters,
    and changes no entry that it reads. It is in eval mode, and its parameters need no gradient.

    It acts deterministically, unless called inside ``set_exploration_type(ExplorationType.RANDOM)``, which samples.

    A recurrent policy also reads ``"is_init"`` ``[*B, 1]`` (TorchRL's ``InitTracker``) and its own state, which the
    environment carries from step to step after ``carry_states(env, policy)`` of
    :mod:`torchrl_trpo.networks`; without the entry, the state is zero.

    The run's environment is made for its specs and closed again, which needs the run's simulator. The global random
    generators are restored.

    Args:
        run_folder: the run's folder, which holds ``checkpoints``.
        checkpoint: ``"latest"``, or ``"best"``: the one with the highest episode return in its iteration.
        device: the policy's device, see :func:`~torchrl_trpo.envs.resolve_device`. Default: torch's default device.

    Returns:
        The policy. A :class:`~torchrl_trpo.errors.SettingError` is raised if there is no such folder, checkpoint or
        device, or if the checkpoint cannot be read.

    Examples:
        >>> from torchrl_trpo import load_policy
        >>> policy = load_policy("outputs/hatrpo/2026-01-31_12-00-00", "best")  # doctest: +SKIP
        >>> env.rollout(100, policy)["next", "agents", "reward"].mean()  # doctest: +SKIP
    """
    where = resolve_device(str(torch.get_default_device() if device is None else device))
    return policy_at(*find_run(run_folder, checkpoint), where)


def policy_at(path: Path, config: Mapping[str, Any], device: torch.device) -> TensorDictModuleBase:
    """Loads the policy of a checkpoint, for observations as the environment gives them.

    Args:
        path: the checkpoint.
        config: the run's settings, as :func:`find_run` gives both.
        device: the policy's device.

    Returns:
        The policy.
    """
    with untouched_generators():
        env = make_run_env(
            config,
            num_envs=1,
            seed=config["seed"],
            device=device,
            normalize_observations=config["normalize_observations"],
        ).to(device)  # a factory may make it elsewhere; only its specs are read
        try:
            policy = make_policy(env, group_keys(env), **config["actor"])
            parts = {"policy": policy}
            if observation_norm(env) is not None:
                parts["collection"] = TransformState(env)
            load_components(path, parts)
            return on_raw_observations(env, policy).to(device).eval().requires_grad_(False)
        finally:
            env.close(raise_if_closed=False)


def find_run(run_folder: str | Path, checkpoint: str = "latest") -> tuple[Path, dict[str, Any]]:
    """Finds a checkpoint of a run, and the settings that it was written with.

    Args:
        run_folder: the run's folder.
        checkpoint: ``"latest"`` or ``"best"``.

    Returns:
        Where the checkpoint is, and the settings, with the ``algorithm``. A
        :class:`~torchrl_trpo.errors.SettingError` is raised if there is none, or it cannot be read.
    """
    path = find_checkpoint(Path(run_folder), checkpoint)
    return path, read_record(path)["config"]


def on_raw_observations(env: EnvBase, policy: TensorDictModuleBase) -> TensorDictModuleBase:
    """Moves an environment's transforms of observations, frozen, into the policy that was trained on them.

    Args:
        env: the environment that the policy was trained on.
        policy: the policy.

    Returns:
        The policy for environments without these transforms; the given policy if there are none.
    """
    observations = {keys.observation for keys in group_keys(env)}
    transforms: list[Transform] = []
    for transform in env.transform:
        cast = isinstance(transform, DTypeCastTransform)
        if cast and (read := [key for key in transform.in_keys if key in observations]):
            transforms.append(DTypeCastTransform(transform.dtype_in, torch.float32, in_keys=read))
    if (norm := observation_norm(env)) is not None:
        transforms.append(norm.to_observation_norm())
    return _OnRawObservations(Compose(*transforms), policy) if transforms else policy


class _OnRawObservations(TensorDictModuleBase):
    """Transforms the observations for a policy, and leaves those in the data as they are."""

    def __init__(self, transform: Transform, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.in_keys = policy.in_keys
        self.out_keys = policy.out_keys
        self.transform = transform
        self.policy = policy

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        inputs = tensordict.select(*self.in_keys, strict=False)  # a new TensorDict of the same tensors
        outputs = self.policy(self.transform(inputs))
        return tensordict.update(outputs.select(*self.out_keys))
