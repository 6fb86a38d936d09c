"""Deterministic evaluation of a policy."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_trpo.envs import GROUP


@torch.no_grad()
def evaluate(env: EnvBase, policy: TensorDictModuleBase, *, max_steps: int) -> Tensor:
    """Plays one episode in each environment, acting deterministically.

    Args:
        env: the environment, batch size ``[num_envs]``.
        policy: the policy.

    Keyword Args:
        max_steps: the episodes' length at most, in steps.

    Returns:
        Each episode's return averaged over agents, ``[num_envs]``.
    """
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        data = env.rollout(max_steps, policy, break_when_any_done=False)
    returns = data["next", GROUP, "episode_reward"].mean(dim=(-2, -1))  # [num_envs, T]
    done = data["next", "done"].squeeze(-1)
    done[:, -1] = True
    first = done.long().argmax(dim=1, keepdim=True)
    return returns.gather(1, first).squeeze(1)


def episode_statistics(data: TensorDictBase) -> dict[str, float]:
    """Returns and lengths of the episodes that ended in a batch.

    Args:
        data: collected data, ``[num_envs, T]``.

    Returns:
        ``episode_return``, the mean over finished episodes of the return averaged over agents, ``episode_return_sum``,
        the same summed over agents, and ``episode_length`` in steps; NaN when no episode ended.
    """
    done = data["next", "done"].squeeze(-1)
    returns = data["next", GROUP, "episode_reward"].squeeze(-1)[done]  # [episodes, n_agents]
    lengths = data["next", "step_count"].squeeze(-1)[done]
    return {
        "episode_return": float(returns.mean(-1).mean()),
        "episode_return_sum": float(returns.sum(-1).mean()),
        "episode_length": float(lengths.float().mean()),
    }
