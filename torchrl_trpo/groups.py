"""Groups of agents: which there are in an environment, and where their entries are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensordict import NestedKey
from torchrl.data import Composite
from torchrl.envs import EnvBase

from torchrl_trpo.layout import in_group


def agent_groups(env: EnvBase) -> dict[str | None, int]:
    """The groups of an environment's agents.

    Args:
        env: the environment.

    Returns:
        The number of agents by group; ``{None: 1}`` for a single agent without a group.
    """
    spec = env.full_action_spec_unbatched
    groups = [group for group in spec.keys() if isinstance(spec[group], Composite)]
    return {group: spec[group, "action"].shape[0] for group in groups} if groups else {None: 1}


@dataclass(frozen=True)
class GroupKeys:
    """Where the entries of a group are.

    Attributes:
        group: the group's name; None for a single agent.
        n_agents: how many agents are in it.
        reward: of the agents, or of the team at the root where the environment has no other.
        done: as ``reward``; likewise ``terminated``.
        action_mask: which discrete actions are allowed, if the environment says so.
        mask: which agents take part, if the environment says so.
    """

    group: str | None
    n_agents: int
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
    "observation": "observation",
    "action": "action",
    "log_prob": "action_log_prob",
    "value": "state_value",
    "advantage": "advantage",
    "value_target": "value_target",
    "central": "central_observation",
}


def group_keys(env: EnvBase) -> list[GroupKeys]:
    """Where the entries of an environment's groups are.

    Args:
        env: the environment.

    Returns:
        The keys of each group.
    """
    observed = set(env.full_observation_spec_unbatched.keys(True, True))

    def own(group: str | None, name: str, keys: Sequence[NestedKey]) -> NestedKey:
        return in_group(group, name) if in_group(group, name) in keys else name

    return [
        GroupKeys(
            group,
            n_agents,
            reward=own(group, "reward", env.reward_keys),
            done=own(group, "done", env.done_keys),
            terminated=own(group, "terminated", env.done_keys),
            action_mask=key if (key := in_group(group, "action_mask")) in observed else None,
            mask=key if (key := in_group(group, "mask")) in observed else None,
        )
        for group, n_agents in agent_groups(env).items()
    ]
