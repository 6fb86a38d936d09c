"""How data is laid out: keys, groups, agent dimensions."""

from __future__ import annotations

from tensordict import NestedKey
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
