"""Removes the numbers of absent agents, and the rewards of steps at which all agents are absent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.envs import Transform

from torchrl_trpo.keys import GroupKeys, finite_where_masked, group_of


class WithoutAbsent(Transform):
    """Cleans the entries of absent agents. An agent is absent where its group's mask is off.

    A number that is not finite becomes 0 in the observation and reward of an absent agent. ``groups`` are all groups of
    the environment: a step at which all their agents are absent is padding, and its rewards become 0. Other entries of
    absent agents stay: in turn-based games, absent agents observe the moves of others, and are paid for their own.
    """

    def __init__(self, groups: Sequence[GroupKeys]) -> None:
        super().__init__()
        self.groups = groups

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._with_observations(tensordict_reset)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        masks = [self._mask(tensordict, keys.mask) for keys in self.groups]  # of the step that is rewarded
        anybody = torch.cat(torch.broadcast_tensors(*[mask.any(-1, keepdim=True) for mask in masks]), -1).any(-1)
        for keys, mask in zip(self.groups, masks, strict=True):
            reward = next_tensordict.get(keys.reward)
            if reward.is_floating_point() and group_of(keys.reward) == keys.group:
                reward = finite_where_masked(reward, mask)
            padded = ~anybody.reshape(*anybody.shape, *[1] * (reward.ndim - anybody.ndim))
            next_tensordict.set(keys.reward, reward.masked_fill(padded, 0))
        return self._with_observations(next_tensordict)

    def _with_observations(self, data: TensorDictBase) -> TensorDictBase:
        for keys in self.groups:
            if keys.mask is not None and (observation := data.get(keys.observation)).is_floating_point():
                data.set(keys.observation, finite_where_masked(observation, self._mask(data, keys.mask)))
        return data

    @staticmethod
    def _mask(data: TensorDictBase, key: NestedKey | None) -> Tensor:
        """The present agents, ``[num_envs, n_agents]``; ``[num_envs, 1]``, all True, for a group without a mask."""
        if key is None:
            return torch.ones(*data.batch_size, 1, dtype=torch.bool, device=data.device)
        return data.get(key).reshape(*data.batch_size, -1).bool()
