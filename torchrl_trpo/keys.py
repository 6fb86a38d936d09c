"""The keys of a batch: entries, groups of agents, masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Composite, Stacked
from torchrl.envs import EnvBase

from torchrl_trpo.errors import PlainKeyError, SettingError, nearest


def path(key: NestedKey) -> tuple[str, ...]:
    """A key as a tuple of its parts."""
    return key if isinstance(key, tuple) else (key,)


def key_list(keys: NestedKey | Sequence[NestedKey]) -> list[NestedKey]:
    """One key or several as a list. A tuple of strings is one nested key, as everywhere in TorchRL."""
    one = isinstance(keys, str) or (isinstance(keys, tuple) and all(isinstance(part, str) for part in keys) and keys)
    return [unravel_key(key) for key in ([keys] if one else keys)]


def next_key(key: NestedKey) -> NestedKey:
    """The key of an entry at ``t+1``, from its key at ``t``."""
    return ("next", *path(key))


def in_group(group: str | None, name: str) -> NestedKey:
    """The key of an entry of a group, or of an environment without groups."""
    return name if group is None else (group, name)


def group_of(key: NestedKey | None) -> str | None:
    """The group of an entry: ``"agents"`` for ``("agents", "observation")``, None for an entry at the root."""
    return key[0] if isinstance(key, tuple) and len(key) > 1 else None


def time_of(tensordict: TensorDictBase) -> int:
    """The time dimension of a batch: the one named "time", or the last."""
    return tensordict.names.index("time") if "time" in tensordict.names else tensordict.ndim - 1


def reads_init(network: TensorDictModuleBase) -> bool:
    """Whether a network is recurrent: as TorchRL's recurrent modules, it reads ``"is_init"``, where episodes start."""
    return any(path(key)[-1] == "is_init" for key in network.in_keys)


def entry(tensordict: TensorDictBase, key: NestedKey | list[NestedKey], role: str) -> Any:
    """A required entry; for a list of keys, a TensorDict of them.

    If it is missing, a PlainKeyError names the entries that there are, and ``role``, the setting that holds the key.
    """
    for name in key if isinstance(key, list) else [key]:
        if tensordict.get(name, None) is None:
            raise PlainKeyError(
                f"{role}: {name!r} is not in the data. {nearest(name, tensordict.keys(True, True))} "
                "Name the entry that is meant where the key is set, or with set_keys."
            )
    return tensordict.select(*key) if isinstance(key, list) else tensordict.get(key)


def finite_where_masked(value: Tensor, mask: Tensor, *, per_agent: bool = True) -> Tensor:
    """Replaces what is not finite by 0 in entries that do not count.

    ``value`` is ``[*R, n_agents, ...]``, or an entry of all agents, ``[*R, ...]``. ``mask`` says which agents count,
    bool ``[*R, n_agents]``, or ``[*R, 1]`` for all of them. ``per_agent`` says whether both belong to the same group
    of agents. An entry of another group, or without an agent dimension, counts where any agent does.
    """
    has_agents = value.ndim > mask.ndim and value.shape[mask.ndim - 1] == mask.shape[-1]
    keep = mask if per_agent and has_agents else mask.any(-1)
    return torch.where(keep.reshape(*keep.shape, *[1] * (value.ndim - keep.ndim)) | value.isfinite(), value, 0.0)


def non_finite(value: Tensor, row_dims: int) -> Tensor:
    """NaN for each row of ``[*R, ...]`` that has a non-finite value or overflows when summed, else 0: ``[*R]``.

    The rows are not copied, and half precision is summed in single precision.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    return 0 * value.reshape(*value.shape[:row_dims], -1).sum(-1, dtype=dtype)


def return_key(reward: NestedKey) -> NestedKey:
    """The key of the running return of an episode, beside the reward."""
    return (*path(reward)[:-1], "episode_reward")


def agent_groups(env: EnvBase) -> dict[str | None, int]:
    """The groups of an environment's agents.

    Args:
        env: the environment.

    Returns:
        The number of agents by group; ``{None: 1}`` for a single agent without a group.

    Raises:
        SettingError: if an action is at another key than ``"action"`` or ``(group, "action")``, or has agents of
            different action spaces.
    """
    spec = env.full_action_spec_unbatched
    groups = [group for group in spec.keys() if isinstance(spec[group], Composite)]
    found = list(spec.keys(True, True))
    if set(found) != {in_group(group, "action") for group in groups or [None]}:
        raise SettingError(
            f"env: its actions are {found}. Legal: 'action' of a single agent, or (group, 'action') of each group of "
            "agents, one action each: use TorchRL's RenameTransform."
        )
    for group in groups:
        if -1 in spec[group].shape or not spec[group, "action"].shape or -1 in spec[group, "action"].shape:
            raise SettingError(
                f"env: the action of group {group!r} has shape {tuple(spec[group, 'action'].shape)}. Legal: "
                "[n_agents, ...], of agents with the same action space; others are groups of their own."
            )
    return {group: spec[group, "action"].shape[0] for group in groups} if groups else {None: 1}


@dataclass(frozen=True)
class GroupKeys:
    """The keys of the entries of a group.

    Attributes:
        group: the group's name; None for a single agent.
        n_agents: the number of agents.
        observation: the agents' observations.
        reward: the agents' rewards, or the team's at the root if the agents have none.
        done: likewise.
        terminated: likewise.
        action_mask: which discrete actions are allowed; None if the environment has no such entry.
        mask: which agents take part; None if the environment has no such entry.
    """

    group: str | None
    n_agents: int
    observation: NestedKey
    reward: NestedKey
    done: NestedKey
    terminated: NestedKey
    action_mask: NestedKey | None
    mask: NestedKey | None

    def counts(self, data: TensorDictBase, like: Tensor) -> Tensor:
        """Which of some values count by the mask, bool of their shape: ``[*B, n_agents]``, or of one agent ``[*B]``."""
        if self.mask is None:
            return torch.ones_like(like, dtype=torch.bool)
        mask = data.get(self.mask).reshape(*data.batch_size, -1)
        return mask.expand(*data.batch_size, self.n_agents).reshape(like.shape)

    @property
    def action(self) -> NestedKey:
        """The key of the agents' actions."""
        return in_group(self.group, "action")

    @property
    def log_prob(self) -> NestedKey:
        """The key of the log-probabilities of the actions."""
        return in_group(self.group, "action_log_prob")

    @property
    def value(self) -> NestedKey:
        """The key of the critic's values."""
        return in_group(self.group, "state_value")

    @property
    def advantage(self) -> NestedKey:
        """The key of the advantages."""
        return in_group(self.group, "advantage")

    @property
    def value_target(self) -> NestedKey:
        """The key of the critic's targets."""
        return in_group(self.group, "value_target")

    @property
    def central(self) -> NestedKey:
        """The key of the input of a centralised critic."""
        return in_group(self.group, "central_observation")

    @property
    def agent_shape(self) -> tuple[int, ...]:
        """The agent dimension of the group's entries, if they have one."""
        return () if self.group is None else (self.n_agents,)

    @property
    def loss_keys(self) -> dict[str, NestedKey]:
        """The keys of a loss, for ``set_keys``."""
        names = ("action", "reward", "done", "terminated", "value", "advantage", "value_target")
        return {**{name: getattr(self, name) for name in names}, "sample_log_prob": self.log_prob}


def group_keys(env: EnvBase) -> list[GroupKeys]:
    """The keys of the entries of an environment's groups.

    If ``"observation"`` is a mapping, as PettingZoo's ``{"observation": ..., "action_mask": ...}``, the observation
    is its one entry beside an ``"action_mask"``.

    Args:
        env: the environment.

    Returns:
        The keys of each group. A missing or unsuitable entry is a :class:`~torchrl_trpo.errors.SettingError` that
        lists the environment's entries.
    """
    return [_keys_of(env, group, n_agents) for group, n_agents in agent_groups(env).items()]


def _keys_of(env: EnvBase, group: str | None, n_agents: int) -> GroupKeys:
    spec = env.full_observation_spec_unbatched
    observed = [key for key in spec.keys(True, True) if group is None or path(key)[0] == group]
    whole, allowed = in_group(group, "observation"), in_group(group, "action_mask")
    within = (*path(whole), "action_mask")
    parts = [key for key in observed if path(key)[: len(path(whole))] == path(whole) and key != within]
    if len(parts) != 1:
        who = "it" if group is None else f"group {group!r}"
        raise SettingError(
            f"env: {who} observes {observed}. Legal: {whole!r}, or one entry in it beside an 'action_mask': use "
            "TorchRL's RenameTransform, or CatTensors for several entries."
        )
    observation, shape = parts[0], spec[parts[0]].shape
    of_agents = group is None or (len(shape) > 1 and shape[0] == n_agents)
    if not of_agents or -1 in shape or isinstance(spec[observation], Stacked):
        legal = "(F,) or (C, H, W)" if group is None else f"({n_agents}, F) or ({n_agents}, C, H, W)"
        raise SettingError(
            f"env: {observation!r} is {type(spec[observation]).__name__} of shape {tuple(shape)}. Legal: {legal}, the "
            "same for all agents of a group; those that differ are groups of their own."
        )
    reward = _own(env, group, "reward", env.reward_keys)
    own_shape = (1,) if group is None or path(reward)[0] != group else (n_agents, 1)
    if (shape := env.full_reward_spec_unbatched[reward].shape) != own_shape:
        raise SettingError(f"env: its {reward!r} has shape {tuple(shape)}. Legal: {own_shape}.")
    if "done" not in env.done_keys:
        raise SettingError(f"env: its ends are {list(env.done_keys)}. Legal: with a 'done' of the whole environment.")
    mask = in_group(group, "mask")
    if mask in observed and (spec[mask].dtype != torch.bool or spec[mask].shape.numel() not in (1, n_agents)):
        raise SettingError(
            f"env: its {mask!r} is {spec[mask].dtype} of shape {tuple(spec[mask].shape)}. Legal: torch.bool, one for "
            f"each of the {n_agents} agents."
        )
    return GroupKeys(
        group,
        n_agents,
        observation=observation,
        reward=reward,
        done=_own(env, group, "done", env.done_keys),
        terminated=_own(env, group, "terminated", env.done_keys),
        action_mask=next((key for key in (allowed, within) if key in observed), None),
        mask=mask if mask in observed else None,
    )


def _own(env: EnvBase, group: str | None, name: str, keys: list[NestedKey]) -> NestedKey:
    """The key of an entry of a group, or of the whole environment at the root if the group has none."""
    for key in (in_group(group, name), name):
        if key in keys:
            return key
    raise SettingError(
        f"env: it has no {in_group(group, name)!r}, and no {name!r} of the team, but {list(keys)}. Use TorchRL's "
        "RenameTransform."
    )
