"""The policy of a run: how it is made, and how a trained one is taken out of its checkpoint."""

from __future__ import annotations

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
from torchrl_trpo.seeding import untouched_generators


def make_policy(
    env: EnvBase,
    groups: Sequence[GroupKeys],
    *,
    sharing: str = "none",
    hidden: Sequence[int] = (128, 128),
    network: str = "mlp",
) -> TensorDictModuleBase:
    """The policy of all groups of agents, as the recipes train it.

    Args:
        env: the environment.
        groups: its groups.

    Keyword Args:
        sharing: ``"none"`` for a network of each agent's own; with ``"group"`` or ``"all"`` those of a group share one.
        hidden: the sizes of the hidden layers.
        network: ``"mlp"``, ``"gru"`` or ``"lstm"``, see :func:`~torchrl_trpo.networks.make_actor`.

    Returns:
        The actors of the groups in sequence, or of a single agent its actor, which read observations
        ``[*B, n_agents, F]`` and write actions ``[*B, n_agents, A]`` with their log-probabilities ``[*B, n_agents]``.
    """
    settings: dict[str, Any] = {"share_params": sharing != "none", "hidden": hidden, "network": network}
    actors = [make_actor(env, keys, **settings) for keys in groups]
    return actors[0] if groups[0].group is None else TensorDictSequential(*actors)


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
    """The environment of a run anew.

    Args:
        config: the run's settings, as in its ``config.yaml``.

    Keyword Args:
        num_envs: the number of environments. A factory that makes batches of the run's size alone makes one of it.
        seed: the seed of the environments' randomness.
        device: where the environments' data are, as for :func:`~torchrl_trpo.envs.make_env`.
        parallel: whether environments that are not vectorised themselves get a process each.
        render: whether the environments must be able to draw themselves.
        normalize_observations: whether observations are normalised; not for what :func:`on_raw_observations` gives.

    Returns:
        The environment, batch size ``[num_envs]``.

    Raises:
        SettingError: if it cannot be made.
    """
    settings = {
        **config["env"],
        "parallel": parallel,
        "seed": seed,
        "device": device,
        "one_group": config["actor"].get("sharing") == "all",
        "state": config["critic"].get("inputs", "observations") != "observations",
        "render": render,
        "normalize_observations": normalize_observations,
    }
    try:
        return make_env(**{**settings, "num_envs": num_envs})
    except SettingError:
        if config["env"]["name"] != "custom":
            raise
    return make_env(**settings)


def load_policy(
    run_folder: str | Path, checkpoint: str = "latest", device: str | torch.device | None = None
) -> TensorDictModuleBase:
    """The trained policy of a run, for any environment with its entries and specs.

    It reads each group's ``(group, "observation")`` ``[*B, n_agents, F]`` as the environment gives it: what the run
    normalised is normalised inside, with the run's statistics, which no longer move. Of a single agent it is
    ``"observation"`` ``[*B, F]``. Where discrete actions are masked it also reads ``(group, "action_mask")``. It writes
    ``(group, "action")``, its log-probability ``(group, "action_log_prob")`` and the distribution's parameters, and
    changes no entry that it reads. It is in eval mode and its parameters need no gradient.

    It acts deterministically, unless called inside ``set_exploration_type(ExplorationType.RANDOM)``, which samples.

    A recurrent policy also reads ``"is_init"`` ``[*B, 1]`` (TorchRL's ``InitTracker``) and its own state, which the
    environment carries from step to step after ``carry_states(env, policy)`` of
    :mod:`torchrl_trpo.networks`; without the entry, the state is zero.

    Global random numbers are as before. The run's environment is made, for its specs, and closed. It needs what the
    recipes need, ``torchrl-trpo[recipes]``, and the run's simulator.

    Args:
        run_folder: the run's folder, which holds ``checkpoints``.
        checkpoint: ``"latest"``, or ``"best"``: the one with the highest episode return in its iteration.
        device: where the policy is to act, see :func:`~torchrl_trpo.envs.resolve_device`. Default: torch's default
            device, the CPU.

    Returns:
        The policy. A :class:`~torchrl_trpo.errors.SettingError` says if there is no such folder, checkpoint or
        device, or if the checkpoint cannot be read.

    Examples:
        >>> from torchrl_trpo import load_policy
        >>> policy = load_policy("outputs/hatrpo/2026-01-31_12-00-00", "best")  # doctest: +SKIP
        >>> env.rollout(100, policy)["next", "agents", "reward"].mean()  # doctest: +SKIP
    """
    where = resolve_device(str(torch.get_default_device() if device is None else device))
    return policy_at(*find_run(run_folder, checkpoint), where)


def policy_at(path: Path, config: Mapping[str, Any], device: torch.device) -> TensorDictModuleBase:
    """The policy of a checkpoint, on observations as the environment gives them.

    Args:
        path: the checkpoint.
        config: the run's settings, as :func:`find_run` gives both.
        device: where it is to act.

    Returns:
        The policy.
    """
    from torchrl_trpo.training.checkpoints import load_components

    with untouched_generators():
        env = make_run_env(
            config,
            num_envs=1,
            seed=config["seed"],
            device=device,
            normalize_observations=config["normalize_observations"],
        ).to(device)  # whose specs alone are read, wherever a factory makes it
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
    """A checkpoint of a run and the run's settings at it.

    Args:
        run_folder: the run's folder.
        checkpoint: ``"latest"`` or ``"best"``.

    Returns:
        Where the checkpoint is, and the settings, with the ``algorithm``. A
        :class:`~torchrl_trpo.errors.SettingError` says if there is none, or it cannot be read.

    Raises:
        ImportError: if the recipes' requirements are not installed.
    """
    try:
        from torchrl_trpo.training import checkpoints
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed. Use: pip install 'torchrl-trpo[recipes]'") from error
    path = checkpoints.find_checkpoint(Path(run_folder), checkpoint)
    return path, checkpoints.read_record(path)["config"]


def on_raw_observations(env: EnvBase, policy: TensorDictModuleBase) -> TensorDictModuleBase:
    """A policy that does itself, frozen, what an environment's transforms do to the observations it was trained on.

    Args:
        env: the environment that the policy was trained on.
        policy: the policy.

    Returns:
        The policy for environments without these transforms; the policy itself if there are none.
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
    """A policy after transforms of what it reads, whose results only the policy sees."""

    def __init__(self, transform: Transform, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.in_keys = policy.in_keys
        self.out_keys = policy.out_keys
        self.transform = transform
        self.policy = policy

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        inputs = tensordict.select(*self.in_keys, strict=False)  # a copy of the structure
        outputs = self.policy(self.transform(inputs))
        return tensordict.update(outputs.select(*self.out_keys))
