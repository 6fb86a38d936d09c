"""Groups of agents: which there are in an environment, and where their entries are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import NestedKey
from torchrl.data import Composite, Stacked
from torchrl.envs import EnvBase

from torchrl_trpo.layout import in_group, path
from torchrl_trpo.suggest import SettingError


def agent_groups(env: EnvBase) -> dict[str | None, int]:
    """The groups of an environment's agents.

    Args:
        env: the environment.

    Returns:
        The number of agents by group; ``{None: 1}`` for a single agent without a group.

    Raises:
        SettingError: if an action is not where the recipes look for it.
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
    """Where the entries of a group are.

    Attributes:
        group: the group's name; None for a single agent.
        n_agents: how many agents are in it.
        observation: of the agents.
        reward: of the agents, or of the team at the root where the environment has no other.
        done: as ``reward``; likewise ``terminated``.
        action_mask: which discrete actions are allowed, if the environment says so.
        mask: which agents take part, if the environment says so.
    """

    group: str | None
    n_agents: int
    observation: NestedKey
    reward: NestedKey
    done: NestedKey
    terminated: NestedKey
    action_mask: NestedKey | None
    mask: NestedKey | None

    def __getattr__(self, name: str) -> NestedKey:
        if name in _ENTRIES:
            return in_group(self.group, _ENTRIES[name])
        raise AttributeError(name)

    @property
    def agent_shape(self) -> tuple[int, ...]:
        """The agent dimension of the group's entries, if they have one."""
        return () if self.group is None else (self.n_agents,)

    @property
    def loss_keys(self) -> dict[str, NestedKey]:
        """The keys of a loss, for ``set_keys``."""
        names = ("action", "reward", "done", "terminated", "value", "advantage", "value_target")
        return {**{name: getattr(self, name) for name in names}, "sample_log_prob": self.log_prob}


_ENTRIES = {
    "action": "action",
    "log_prob": "action_log_prob",
    "value": "state_value",
    "advantage": "advantage",
    "value_target": "value_target",
    "central": "central_observation",
}


def group_keys(env: EnvBase) -> list[GroupKeys]:
    """Where the entries of an environment's groups are.

    Where ``"observation"`` is a mapping, as PettingZoo's ``{"observation": ..., "action_mask": ...}``, the observation
    is its one entry beside an ``"action_mask"``.

    Args:
        env: the environment.

    Returns:
        The keys of each group. A :class:`~torchrl_trpo.suggest.SettingError` says which entries there are, if one is
        not where the recipes look for it.
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
    """The entry of a group, or else the one of all at the root."""
    for key in (in_group(group, name), name):
        if key in keys:
            return key
    raise SettingError(
        f"env: it has no {in_group(group, name)!r}, and no {name!r} of the team, but {list(keys)}. Use TorchRL's "
        "RenameTransform."
    )
