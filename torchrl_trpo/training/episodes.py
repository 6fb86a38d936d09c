"""Episode returns: of collected data, and of a policy that plays episodes."""

from __future__ import annotations

from collections.abc import Sequence

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
    with set_exploration_type(ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM):
        data = env.rollout(max_steps, policy, break_when_any_done=False)
    returns = _returns(data, group_keys(env))  # [num_envs, T, n_agents]
    done = data["next", "done"].squeeze(-1)
    done[:, -1] = True
    first = done.long().argmax(dim=1)  # [num_envs]
    episodes = torch.arange(len(first), device=first.device)
    return TensorDict({"episode_return": returns[episodes, first], "episode_length": first + 1}, [len(first)])


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
    """The running returns of the agents of all groups, ``[num_envs, T, n_agents]``; a team's return is each agent's."""
    parts = []
    for keys in groups:
        returns = data["next"].get(return_key(keys.reward))  # [num_envs, T, n_agents, 1] or [num_envs, T, 1]
        parts.append(returns.flatten(data.batch_dims).expand(*data.batch_size, keys.n_agents))
    returns = torch.cat(parts, -1)
    return returns if returns.is_floating_point() else returns.float()
