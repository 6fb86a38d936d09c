"""Episode returns: of collected data, and of a policy that plays episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_trpo.keys import GroupKeys, group_keys, return_key
from torchrl_trpo.numerics.statistics import read
from torchrl_trpo.parallel.ranks import ALONE, Ranks


def evaluate(env: EnvBase, policy: TensorDictModuleBase, *, max_steps: int) -> Tensor:
    """Plays one episode in each environment, acting deterministically.

    Args:
        env: the environment, batch size ``[num_envs]``.
        policy: the policy.

    Keyword Args:
        max_steps: the maximal length of an episode, in steps.

    Returns:
        Each episode's return averaged over agents, ``[num_envs]``.
    """
    return play_episodes(env, policy, max_steps=max_steps)["episode_return"].mean(-1)


@torch.no_grad()
def play_episodes(
    env: EnvBase, policy: TensorDictModuleBase, *, max_steps: int, deterministic: bool = True
) -> TensorDict:
    """Plays one episode in each environment: the first after a reset.

    Args:
        env: the environment, batch size ``[num_envs]``.
        policy: the policy.

    Keyword Args:
        max_steps: the maximal length of an episode, in steps.
        deterministic: whether the policy acts deterministically; otherwise it samples.

    Returns:
        ``"episode_return"`` ``[num_envs, n_agents]``, for the agents of all groups in order, and ``"episode_length"``
        ``[num_envs]``, in steps.
    """
    groups = group_keys(env)
    returns: Any = 0.0
    running = torch.ones(env.batch_size, dtype=torch.bool, device=env.device)
    lengths = torch.zeros_like(running, dtype=torch.long)
    with set_exploration_type(ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM):
        data = env.reset()
        for step in range(1, max_steps + 1):  # env.rollout would keep the data: gigabytes, of many environments
            data.update(policy(data))
            taken, data = env.step_and_maybe_reset(data) if step < max_steps else (env.step(data), data)
            returns = torch.where(running.unsqueeze(-1), _returns(taken, groups), returns)
            lengths += running
            running &= ~taken["next", "done"].squeeze(-1)
    return TensorDict({"episode_return": returns, "episode_length": lengths}, env.batch_size)


def episode_statistics(data: TensorDictBase, groups: Sequence[GroupKeys], ranks: Ranks = ALONE) -> dict[str, float]:
    """Mean return and length of the episodes that ended in a batch.

    Args:
        data: collected data, ``[num_envs, T]``.
        groups: the groups of agents.
        ranks: the processes whose episodes are counted. Default: this one alone.

    Returns:
        ``episode_return``, the mean over finished episodes of the return averaged over agents, ``episode_return_sum``,
        the same summed over agents, ``episode_length`` in steps, and with several groups ``episode_return_<group>``,
        averaged over the group's agents; NaN when no episode ended.
    """
    ends = data["next", "done"].squeeze(-1).nonzero(as_tuple=True)
    returns = _returns(data, groups)[ends]  # [episodes, n_agents]
    lengths = data["next", "step_count"].squeeze(-1)[ends]
    returns, lengths = ranks.concat(returns), ranks.concat(lengths)
    statistics = {
        "episode_return": returns.mean(-1).mean(),
        "episode_return_sum": returns.sum(-1).mean(),
        "episode_length": lengths.float().mean(),
    }
    if len(groups) > 1:
        parts = returns.split([keys.n_agents for keys in groups], -1)
        for keys, part in zip(groups, parts, strict=True):
            statistics[f"episode_return_{keys.group}"] = part.mean()
    return read(statistics)


def _returns(data: TensorDictBase, groups: Sequence[GroupKeys]) -> Tensor:
    """The running returns of the agents of all groups, ``[*B, n_agents]``; a team's return is each agent's."""
    parts = []
    for keys in groups:
        returns = data["next"].get(return_key(keys.reward))  # [*B, n_agents, 1] or [*B, 1]
        parts.append(returns.flatten(data.batch_dims).expand(*data.batch_size, keys.n_agents))
    returns = torch.cat(parts, -1)
    return returns if returns.is_floating_point() else returns.float()
