"""Generalised advantage estimation with masks, recurrent critics and normalised values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, dispatch, skip_existing
from torch import Tensor
from torchrl.modules import ValueNorm, set_recurrent_mode
from torchrl.objectives import AUTO_LOSS_MASK_KEYS
from torchrl.objectives.value import MultiAgentGAE

from torchrl_trpo.errors import nearest
from torchrl_trpo.keys import entry, finite_where_masked, group_of, key_list, next_key, path, reads_init
from torchrl_trpo.objectives.functional import parameters_restored
from torchrl_trpo.objectives.step_values import add_states, batch_norms, can_share, shared_values

_TRAJECTORIES = ("collector", "traj_ids")


class AgentGAE(MultiAgentGAE):
    r"""TorchRL's :class:`~torchrl.objectives.value.MultiAgentGAE` with masks, recurrent critics and normalised values.

    GAE (Schulman et al. 2016, arXiv:1506.02438, equation 16). Team rewards and done flags ``[*B, T, 1]`` are broadcast
    to the agents, and steps that were truncated but not terminated are bootstrapped. Beyond its parent it

    - masks padded steps: a step at which no agent counts (``mask_key``, ``other_mask_keys``) does not affect the steps
      before it, and non-finite values of masked entries are replaced. The step before the padding ends its sequence. It
      is bootstrapped, unless the mask at ``t+1`` is off for all agents and no done flag is set: then it counts as
      terminated. An agent that is masked while others are not keeps its sequence, as in games by turns, where it is
      rewarded for its move after the moves of others. The death of an agent must be in its own done and terminated
      flags;
    - evaluates recurrent critics over whole sequences, and :math:`V(o_{t+1})` with the state that follows :math:`o_t`,
      also where an episode ends. A sequence starts with the state recorded in the data, or with none;
    - denormalises the values of a critic that outputs normalised ones (``value_norm``);
    - turns the agents' rewards into one for the team (``team_reward``).

    Keyword Args:
        gamma: the discount.
        lmbda: GAE's :math:`\lambda`.
        value_network: the critic, to values ``[*B, T, n_agents, 1]`` (without agents ``[*B, T, 1]``).
        mask_key: the mask of the entries that count, bool ``[*B, T]`` or ``[*B, T, n_agents]``; None for all.
            ``TRPOLoss`` sets it to its own ``loss_mask_key``; for any other loss give ``mask_key=loss.loss_mask_key``.
            Default: ``"auto"``, as for losses: the ``("collector", "mask")`` of ``split_trajectories``, if it exists.
        team_reward: ``"mean"`` or ``"sum"``: replaces the agents' rewards by one for the team. Default: rewards as
            they are.
        reward_keys: the key, or keys, of the rewards that ``team_reward`` combines, for teams of several groups.
            Default: the estimator's own reward.
        other_mask_keys: the masks of all groups, if there are several. Default: none.
        value_norm: a :class:`~torchrl.modules.ValueNorm`: the critic outputs normalised values, which are denormalised
            here. Give the same one to the loss, which normalises the targets. Default: raw values.
        **kwargs: keywords of :class:`~torchrl.objectives.value.MultiAgentGAE`.

    Raises:
        ValueError: if ``gamma`` or ``lmbda`` is not from 0 to 1, or ``team_reward`` is unknown.
        ValueError: when called with a critic that does not write one number for each agent, or for each step.
        ValueError: when called on data whose trajectories (``("collector", "traj_ids")``) change along time where none
            ends, as in a batch that was flattened.
        ValueError: when called with a recurrent critic on data whose time is not the last dimension, or in chunks that
            cut its sequences; or with ``shifted`` where time is neither the last dimension nor named.
        KeyError: when called on data without one of the entries.
    """

    # _call_value_nets, _normalize_advantage and _get_time_dim are hooks of TorchRL's own estimators; none is public.
    average_gae: bool
    value_norm: ValueNorm | None
    value_network: TensorDictModuleBase | None

    def __init__(
        self,
        *,
        mask_key: NestedKey | Literal["auto"] | None = "auto",
        other_mask_keys: NestedKey | Sequence[NestedKey] = (),
        team_reward: Literal["mean", "sum"] | None = None,
        reward_keys: NestedKey | Sequence[NestedKey] | None = None,
        value_norm: ValueNorm | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name in ("gamma", "lmbda"):
            if not 0 <= float(getattr(self, name)) <= 1:
                raise ValueError(f"{name}: {float(getattr(self, name)):g}. Legal: from 0 to 1.")
        if self.value_network is not None and (reads_init(self.value_network) or batch_norms(self.value_network)):
            self.deactivate_vmap = True  # TorchRL's own recurrent modules branch on what is in the data
        if team_reward not in (None, "mean", "sum"):
            raise ValueError(f"team_reward: {team_reward!r}. {nearest(team_reward, ['mean', 'sum', None])}")
        self.mask_keys = self.masks_of(mask_key)
        self.other_mask_keys = key_list(other_mask_keys)
        self.team_reward = team_reward
        self.reward_keys = None if reward_keys is None else key_list(reward_keys)
        self.value_norm = value_norm
        if value_norm is not None:
            value_norm.critic_is_normalized = True  # a loss whose advantages this estimator computes must know

    @staticmethod
    def masks_of(mask_key: NestedKey | Literal["auto"] | None) -> tuple[NestedKey, ...]:
        """The masks that a ``mask_key`` stands for."""
        if mask_key == "auto":
            return tuple(key for key in AUTO_LOSS_MASK_KEYS if key != "shifted_valid")  # its own output
        return () if mask_key is None else (unravel_key(mask_key),)

    @property
    def in_keys(self) -> list[NestedKey]:
        """The keys that :meth:`forward` reads."""
        return [unravel_key(key) for key in super().in_keys]

    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Evaluates the critic and writes advantages and value targets.

        Args:
            tensordict: the data, ``[*B, T]``; written to.

        Keyword Args:
            params: the critic's parameters, instead of the value network's own.
            target_params: the critic's parameters for the values at ``t+1``.
            time_dim: the time dimension. Default: the one named "time", or the last.

        Returns:
            The same tensordict with the value, ``advantage`` and ``value_target``, each ``[*B, T, n_agents, 1]``.
            With ``average_gae``, advantages that do not count are zero.
        """
        data = self._prepared(tensordict, time_dim)
        average, self.average_gae = self.average_gae, False  # the parent's average counts masked entries too
        try:
            with set_recurrent_mode(True), parameters_restored(self.value_network):
                super().forward(data, params=params, target_params=target_params, time_dim=time_dim)
        finally:
            self.average_gae = average
        keys = self.tensor_keys
        if average:
            data.set(keys.advantage, self._averaged(data))
        for key in (keys.value, next_key(keys.value), keys.advantage, keys.value_target, "shifted_valid"):
            if data.get(key, None) is not None:
                tensordict.set(key, data.get(key))
        return tensordict

    def value_estimate(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> Tensor:
        """The value target alone, ``[*B, T, n_agents, 1]``.

        Args:
            tensordict: the data, ``[*B, T]``.
            *args: as for :meth:`~torchrl.objectives.value.MultiAgentGAE.value_estimate`.
            **kwargs: as for :meth:`~torchrl.objectives.value.MultiAgentGAE.value_estimate`.
        """
        with set_recurrent_mode(True), parameters_restored(self.value_network):
            return super().value_estimate(self._prepared(tensordict, kwargs.get("time_dim")), *args, **kwargs)

    def _prepared(self, tensordict: TensorDictBase, time_dim: int | None) -> TensorDictBase:
        """A shallow copy of the data with the team's reward, and with masked entries that cannot spread."""
        keys = self.tensor_keys
        # Without the default key, done stands in.
        named = [] if keys.terminated == self.default_keys.terminated else [keys.terminated]
        for key in (keys.reward, keys.done, *named):
            entry(tensordict, next_key(key), "the reward, done and terminated keys")
        self._check_time(tensordict, time_dim)
        data = tensordict.clone(False)
        self._leave_out_masked(data, time_dim)
        self._check_trajectories(data, time_dim)
        if self.team_reward is not None:
            names = [keys.reward] if self.reward_keys is None else self.reward_keys
            own_rewards = [entry(data, next_key(name), "reward_keys") for name in dict.fromkeys(names)]
            rewards = torch.cat([reward.flatten(data.batch_dims) for reward in own_rewards], -1)  # [*B, T, all agents]
            team = rewards.mean(-1) if self.team_reward == "mean" else rewards.sum(-1)
            own = data.get(next_key(keys.reward))
            team = team.reshape(*team.shape, *[1] * (own.ndim - team.ndim)).expand_as(own)
            data.set(next_key(keys.reward), team)
        return data

    def _averaged(self, data: TensorDictBase) -> Tensor:
        """The advantages, standardised over the entries that count; the others are set to zero."""
        advantage, mask, valid = data.get(self.tensor_keys.advantage), self._mask(data), data.get("shifted_valid", None)
        if valid is not None:
            valid = valid.reshape(*data.batch_size, -1)
            mask = valid if mask is None else mask & valid
        groups = None if self.group_key is None else entry(data, self.group_key, "group_key")
        has_agents = self.agent_dim % advantage.ndim >= data.batch_dims
        normalize = self._normalize_advantage if has_agents else super(MultiAgentGAE, self)._normalize_advantage
        if mask is None:
            return normalize(advantage, None, groups)
        counts = mask.reshape(*mask.shape, *[1] * (advantage.ndim - mask.ndim)).expand_as(advantage)
        advantage = normalize(torch.where(counts, advantage, 0.0), mask, groups)
        return torch.where(counts, advantage, 0.0)

    def _check_time(self, data: TensorDictBase, time_dim: int | None) -> None:
        """Refuses a time dimension that the computation would not use, and chunks that cut sequences."""
        time, last = self._get_time_dim(time_dim, data), data.ndim - 1
        given = self.time_dim if time_dim is None else time_dim
        recurrent = self.value_network is not None and reads_init(self.value_network)
        if recurrent and time != last:
            raise ValueError(
                f"time_dim: {given}. A recurrent critic reads sequences along the last dimension: [*B, T]."
            )
        if self.shifted and time != last and data.names[time] != "time":
            raise ValueError(f"time_dim: {given}. shifted=True takes the last dimension, or the one named 'time'.")
        chunked = self.value_chunk_size is not None or self.num_chunks is not None
        if recurrent and chunked and self.value_chunk_dim % data.ndim == last:
            raise ValueError(
                f"value_chunk_dim: {self.value_chunk_dim}. It cuts the sequences of a recurrent critic; legal: a "
                "dimension other than time."
            )

    def _check_trajectories(self, data: TensorDictBase, time_dim: int | None) -> None:
        """Refuses data in which steps follow those of another trajectory, if they are numbered, as collectors do."""
        ids, time = data.get(_TRAJECTORIES, None), self._get_time_dim(time_dim, data)
        if ids is None or ids.shape != data.batch_size:
            return
        dones = [
            done for key, done in data["next"].items(True, True) if path(key)[-1] == path(self.tensor_keys.done)[-1]
        ]
        ends = torch.stack([done.reshape(*data.batch_size, -1).any(-1) for done in dones]).any(0)
        before, after = (slice_of.narrow(time, start, ids.shape[time] - 1) for slice_of, start in ((ids, 0), (ids, 1)))
        torn = (before != after) & ~ends.narrow(time, 0, ids.shape[time] - 1)
        if torn.any() and self.lmbda:  # with lmbda = 0 steps stand alone
            raise ValueError(
                f"{_TRAJECTORIES}: the trajectory changes along time, dimension {time} of {tuple(data.batch_size)}, at "
                f"{int(torn.sum())} steps where no episode ends. The advantages of one would leak into the other. "
                "Legal: the batch as it was collected, [*B, T]; flatten or shuffle it after the advantages."
            )

    def _leave_out_masked(self, data: TensorDictBase, time_dim: int | None) -> None:
        """Clears the masked entries of all groups, and ends sequences before padded steps."""
        own_group = group_of(self.tensor_keys.value)
        others = [
            (key, _as_mask(data, entry(data, key, "other_mask_keys")), _as_mask(data, data.get(next_key(key), None)))
            for key in self.other_mask_keys
            if group_of(key) != own_group
        ]
        for key, other, next_other in others:
            self._clear_masked(data, other, next_other, group_of(key))
        mask, next_mask = self._mask(data), self._mask(data, "next")
        if mask is None:
            return
        self._clear_masked(data, mask, next_mask, own_group)
        if any(group_of(key) != own_group for key in self.mask_keys):
            others = []  # the mask is of whole steps, not of agents
        now, following = [mask, *(each for _, each, _ in others)], [next_mask, *(each for *_, each in others)]
        gone = None if any(each is None for each in following) else ~torch.cat(following, -1).any(-1)
        self._end_before_padding(data, ~torch.cat(now, -1).any(-1), gone, time_dim)

    def _mask(self, data: TensorDictBase, *prefix: str) -> Any:
        """The mask of the entries that count, bool ``[*B, T, n]``, or ``[*B, T, 1]`` for all agents; None for all."""
        entries = [data.get((*prefix, *path(key)), None) for key in self.mask_keys]
        masks = [mask for value in entries if (mask := _as_mask(data, value)) is not None]
        return torch.stack(torch.broadcast_tensors(*masks)).all(0) if masks else None

    def _clear_masked(self, data: TensorDictBase, mask: Tensor, next_mask: Tensor | None, group: str | None) -> None:
        """Replaces non-finite values where a group's mask ``[*B, T, n]`` (or 1) is off; at ``t+1``, either mask."""
        own_group = group == group_of(self.tensor_keys.value)
        rewards = [self.tensor_keys.reward, *(self.reward_keys or ())]  # of the action at t
        both = mask if next_mask is None else mask & next_mask
        for name in [*self._read_keys(), *rewards]:
            if not own_group and group_of(name) != group:
                continue
            for key, counts in ((name, mask), (next_key(name), mask if name in rewards else both)):
                value = data.get(key, None)
                if value is not None and value.is_floating_point():
                    data.set(key, finite_where_masked(value, counts, per_agent=group_of(name) == group))

    def _end_before_padding(
        self, data: TensorDictBase, padded: Tensor, gone: Tensor | None, time_dim: int | None
    ) -> None:
        """Ends sequences before ``padded`` steps, and where no agent counts at ``t+1`` (``gone``); both ``[*B, T]``."""
        time_dim = self._get_time_dim(time_dim, data)
        done_key, terminated_key = (next_key(key) for key in (self.tensor_keys.done, self.tensor_keys.terminated))
        done = data.get(done_key)
        terminated = data.get(terminated_key, done)
        ends = padded | padded.roll(-1, time_dim)
        if gone is not None:
            ends = ends | gone
            gone = gone.reshape(*gone.shape, *[1] * (done.ndim - gone.ndim))
            terminated = terminated | (gone & ~done)
        data.set(terminated_key, terminated)
        data.set(done_key, done | ends.reshape(*ends.shape, *[1] * (done.ndim - ends.ndim)))

    def _read_keys(self) -> list[NestedKey]:
        """The entries that are read at ``t`` and ``t+1``, beside rewards, and may hold non-finite values."""
        return [] if self.value_network is None else list(self.value_network.in_keys)

    def _call_value_nets(
        self,
        data: TensorDictBase,
        params: TensorDictBase | None,
        next_params: TensorDictBase | None,
        *args: Any,
        value_key: NestedKey,
        **kwargs: Any,
    ) -> Any:
        network, time_dim = self.value_network, self._get_time_dim(None, data)
        if network is not None and reads_init(network):
            add_states(network, data, params, time_dim=time_dim)
        following = next_key(value_key)
        known = [skip_existing() and data.get(key, None) is not None for key in (value_key, following)]
        in_parts = self.shifted or self.value_chunk_size is not None or self.num_chunks is not None
        values = None
        if network is not None and not in_parts and not any(known) and can_share(network, data, params, next_params):
            finite = self._sanitize_next_obs_nan(data, network.in_keys)
            values = shared_values(network, finite, params, value_key=value_key, time_dim=time_dim)
            self.deactivate_vmap |= values is None  # the critic may draw random numbers, which vmap refuses
        if values is not None:
            value, next_value, valid = *values, None
        else:
            of_parent = super()._call_value_nets(data, params, next_params, *args, value_key=value_key, **kwargs)
            value, next_value, valid = of_parent
        if value.ndim <= data.batch_dims or value.shape[-1] != 1:
            raise ValueError(
                f"value: the critic writes {value_key!r} of shape {tuple(value.shape)}, with data "
                f"{tuple(data.batch_size)}. Legal: a number for each agent, [*B, T, n_agents, 1]; without agents "
                "[*B, T, 1]."
            )
        if self.value_norm is not None:  # values from the data are in the rewards' units already
            value = value if known[0] else self.value_norm.denormalize(value)
            next_value = next_value if known[1] else self.value_norm.denormalize(next_value)
        data.set(value_key, value)  # the parent writes into a copy where next observations are NaN
        data.set(following, next_value)
        return value, next_value, valid


def _as_mask(data: TensorDictBase, value: Tensor | None) -> Any:
    """A mask as ``[*B, T, n]`` or ``[*B, T, 1]``; None if there is none."""
    return None if value is None else value.reshape(*data.batch_size, -1).bool()
