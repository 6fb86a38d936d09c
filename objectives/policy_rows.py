"""The rows of a batch as a policy update reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor


@dataclass(frozen=True)
class PolicyRows:
    """A batch flattened to ``N`` rows, each ``[N, *A, ...]`` with ``A`` the agents if there are several.

    Attributes:
        inputs: what the policy reads, batch size ``[N]``.
        action: the actions taken, ``[N, *A, action_dim]``, or a TensorDict of composite actions.
        log_prob: ``log π_k(u|o)`` as collected, ``[N, *A, 1]``.
        advantage: ``Â``, ``[N, *A, 1]``.
        weight: what a row counts in the means, ``[N, *A, 1]`` or ``[1]``; sums to 1 over the rows of a region.
        factor: the ``M`` of a sequential update, ``[N, *A, 1]`` or ``[1]``.
    """

    inputs: TensorDict
    action: Tensor | TensorDictBase
    log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    factor: Tensor

    def of_agent(self, agent: int) -> PolicyRows:
        """The rows of one agent, contiguous, with an agent dimension of 1.

        Args:
            agent: the agent's index.
        """
        n_agents = self.log_prob.shape[1]

        def select(value: Tensor) -> Tensor:
            return value[:, agent : agent + 1].contiguous()

        return PolicyRows(
            inputs=self.inputs.named_apply(
                lambda key, value: select(value) if has_agent_dim(key, value, n_agents) else value, nested_keys=True
            ),
            action=self.action.apply(select) if isinstance(self.action, TensorDictBase) else select(self.action),
            log_prob=select(self.log_prob),
            advantage=select(self.advantage),
            weight=select(self.weight) if self.weight.ndim > 1 else self.weight,
            factor=select(self.factor) if self.factor.ndim > 1 else self.factor,
        )

    def with_factor(self, factor: Tensor) -> PolicyRows:
        """The same rows with another ``M``.

        Args:
            factor: one number per row, ``[N]``.
        """
        return replace(self, factor=factor.reshape(-1, *[1] * (self.log_prob.ndim - 1)))


def has_agent_dim(key: NestedKey, value: Tensor, n_agents: int) -> bool:
    """Whether an entry ``[N, ...]`` is one per agent: it lies in a group, as ``("agents", "observation")`` does.

    Args:
        key: the entry's key.
        value: the entry.
        n_agents: the number of agents.
    """
    return isinstance(key, tuple) and value.ndim > 1 and value.shape[1] == n_agents


def clear_masked(key: NestedKey, value: Tensor, mask: Tensor) -> Tensor:
    """Zeros what a mask excludes, so that padding, NaNs included, cannot spread into sums or gradients.

    Args:
        key: the entry's key.
        value: the entry, ``[N, ...]``.
        mask: which rows count, bool ``[N, *A, 1]``.
    """
    keep = mask.squeeze(-1)  # [N, *A]
    if keep.ndim > 1 and not has_agent_dim(key, value, keep.shape[1]):
        keep = keep.any(dim=1)
    return torch.where(keep.reshape(*keep.shape, *[1] * (value.ndim - keep.ndim)), value, torch.zeros_like(value))
