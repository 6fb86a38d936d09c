"""How data is laid out: keys, groups, agent dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, unravel_key
from tensordict.nn import TensorDictModuleBase
from torch import Tensor


def path(key: NestedKey) -> tuple[str, ...]:
    """A key as a tuple.

    Args:
        key: the key.

    Returns:
        Its parts.
    """
    return key if isinstance(key, tuple) else (key,)


def key_list(keys: NestedKey | Sequence[NestedKey]) -> list[NestedKey]:
    """One key or several as a list. A tuple of strings is one nested key, as everywhere in TorchRL.

    Args:
        keys: the keys.

    Returns:
        The keys, each a string or a tuple of strings.
    """
    one = isinstance(keys, str) or (isinstance(keys, tuple) and all(isinstance(part, str) for part in keys) and keys)
    return [unravel_key(key) for key in ([keys] if one else keys)]


def next_key(key: NestedKey) -> NestedKey:
    """The key of an entry at ``t+1``.

    Args:
        key: the entry's key at ``t``.

    Returns:
        The key.
    """
    return ("next", *path(key))


def in_group(group: str | None, name: str) -> NestedKey:
    """The key of an entry of a group, or of an environment without groups.

    Args:
        group: the group, or None.
        name: the entry's name.

    Returns:
        The key.
    """
    return name if group is None else (group, name)


def group_of(key: NestedKey | None) -> str | None:
    """The group of an entry: "agents" for ("agents", "observation"), None for an entry at the root.

    Args:
        key: the entry's key.

    Returns:
        The group.
    """
    return key[0] if isinstance(key, tuple) and len(key) > 1 else None


def reads_init(network: TensorDictModuleBase) -> bool:
    """Whether a network is recurrent: it reads where episodes begin, ``"is_init"``, as TorchRL's recurrent modules do.

    Args:
        network: a policy or a critic.

    Returns:
        True if it is.
    """
    return any(path(key)[-1] == "is_init" for key in network.in_keys)


def has_agent_dim(value: Tensor, n_agents: int, row_dims: int) -> bool:
    """Whether an entry is one per agent, ``[*R, n_agents, ...]``, and not one for all, ``[*R, S]``.

    Args:
        value: the entry.
        n_agents: the number of agents.
        row_dims: the number of dimensions in ``*R``.

    Returns:
        True if it is.
    """
    return value.ndim > row_dims + 1 and value.shape[row_dims] == n_agents


def finite_where_masked(value: Tensor, mask: Tensor, *, per_agent: bool = True) -> Tensor:
    """Zeros for what is not finite in entries that do not count.

    Args:
        value: the entry, ``[*R, n_agents, ...]``, or one of all agents, ``[*R, ...]``.
        mask: which agents count, bool ``[*R, n_agents]``, or ``[*R, 1]`` for all of them.

    Keyword Args:
        per_agent: whether an entry of as many agents as the mask is of the same agents. An entry of all agents counts
            where any of them does.

    Returns:
        The entry.
    """
    keep = mask if per_agent and has_agent_dim(value, mask.shape[-1], mask.ndim - 1) else mask.any(-1)
    return torch.where(keep.reshape(*keep.shape, *[1] * (value.ndim - keep.ndim)) | value.isfinite(), value, 0.0)


def non_finite(value: Tensor, row_dims: int) -> Tensor:
    """NaN where a row has anything that is not finite, or a sum beyond the range of its type, else 0.

    The rows are not copied.

    Args:
        value: the rows, ``[*R, ...]``.
        row_dims: the number of dimensions in ``*R``.

    Returns:
        A number for each row, ``[*R]``.
    """
    return 0 * value.reshape(*value.shape[:row_dims], -1).sum(-1)


def return_key(reward: NestedKey) -> NestedKey:
    """Where the running return of an episode is, beside the reward.

    Args:
        reward: the reward's key.

    Returns:
        The key.
    """
    return (*path(reward)[:-1], "episode_reward")
