"""The rows of a batch as a policy update reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor
from torch import distributions as D
from torchrl.modules.models.multiagent import MultiAgentNetBase
from torchrl.objectives import PPOLoss

from torchrl_trpo.distributions.divergence import log_prob, sum_events
from torchrl_trpo.errors import PlainKeyError, nearest
from torchrl_trpo.keys import group_of, has_agent_dim, non_finite, path
from torchrl_trpo.parallel.ranks import Ranks, check_same_length

LOG_PROB_ROLE = "sample_log_prob (a policy with return_log_prob=True writes it)"


@dataclass(frozen=True)
class PolicyRows:
    """A batch flattened to ``N`` rows, ``[N, *A, ...]`` with ``A`` the agents if there are several.

    For a recurrent policy the rows are sequences, ``[N, T, *A, ...]``: both dimensions are written ``*R`` here.

    Attributes:
        inputs: what the policy reads, batch size ``[*R]``.
        action: the actions taken, ``[*R, *A, action_dim]``, or a TensorDict of composite actions.
        log_prob: ``log π_k(u|o)`` as collected, ``[*R, *A, 1]``.
        advantage: ``Â``, ``[*R, *A, 1]``.
        weight: what a row counts in the means, ``[*R, *A, 1]`` or ``[1]``; sums to 1 over the rows of a region.
        factor: the ``M`` of a sequential update, ``[*R, *A, 1]`` or ``[1]``.
        row_dims: the number of dimensions in ``*R``.
    """

    inputs: TensorDict
    action: Tensor | TensorDictBase
    log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    factor: Tensor
    row_dims: int = 1

    def __len__(self) -> int:
        """The number of rows or sequences, ``N``."""
        return self.log_prob.shape[0]

    @property
    def steps_per_row(self) -> int:
        """The environment steps in a row, 1 or those of a sequence."""
        return self.log_prob.shape[1 : self.row_dims].numel()

    @property
    def agent_shape(self) -> torch.Size:
        """The agent dimension ``*A``, if there is one."""
        return self.log_prob.shape[self.row_dims : -1]

    def of_agent(self, agent: int) -> PolicyRows:
        """The rows of one agent, views with an agent dimension of 1.

        Args:
            agent: the agent's index.

        Returns:
            The agent's rows.
        """
        return self._map(lambda value, per_agent: value.narrow(self.row_dims, agent, 1) if per_agent else value)

    def contiguous(self) -> PolicyRows:
        """The rows, copied where they are spread over memory."""
        return self._map(lambda value, _: value.contiguous())

    def take(self, index: Tensor | slice) -> PolicyRows:
        """Some of the rows, with the weights they have.

        Args:
            index: which rows, or sequences.

        Returns:
            The rows.
        """
        return self._map(lambda value, _: value[index])

    def log_ratio(self, dist: D.Distribution, cap: Tensor | None = None) -> Tensor:
        """``log π_θ(u|o) / π_k(u|o)`` of the actions taken.

        Args:
            dist: the policy ``π_θ`` at the rows.
            cap: the largest ratio, as ``PPOLoss`` caps it: the value is capped, the gradient keeps flowing.

        Returns:
            The logarithms, ``[*R, *A, 1]``.
        """
        log_ratio = log_prob(dist, self.action, self.log_prob.ndim - 1).unsqueeze(-1) - self.log_prob
        return log_ratio if cap is None else log_ratio + (cap.log() - log_ratio.detach()).clamp_max(0)

    def with_factor(self, factor: Tensor) -> PolicyRows:
        """The same rows with another ``M``.

        Args:
            factor: one number per row, ``[N]`` (of sequences ``[N * T]``).

        Returns:
            The rows.
        """
        shape = [*self.log_prob.shape[: self.row_dims], *[1] * (self.log_prob.ndim - self.row_dims)]
        return replace(self, factor=factor.reshape(shape))

    def _map(self, function: Callable[[Tensor, bool], Tensor]) -> PolicyRows:
        """Applies a function of an entry, and whether it is one per agent, to what there is per row."""
        agents = self.agent_shape.numel()

        def of_tensordict(value: TensorDictBase, in_group: bool = False) -> TensorDict:
            has_agents = value.batch_dims > self.row_dims
            in_group = in_group or has_agents  # its entries are one per agent, whatever their shape
            like = self.log_prob.new_empty((*value.batch_size, 1))
            inner = {}
            for key, child in value.items():
                if is_tensor_collection(child):
                    inner[key] = of_tensordict(child, in_group)
                else:
                    inner[key] = function(child, in_group or has_agent_dim(child, agents, self.row_dims))
            return TensorDict(inner, batch_size=function(like, has_agents).shape[:-1])

        def of_scalar_rows(value: Tensor) -> Tensor:
            per_agent = value.ndim > self.row_dims + 1 and value.shape[self.row_dims] > 1
            return function(value, per_agent) if value.ndim > 1 else value

        per_agent = len(self.agent_shape) > 0
        return replace(
            self,
            inputs=of_tensordict(self.inputs),
            action=function(self.action, per_agent)
            if isinstance(self.action, Tensor)
            else of_tensordict(self.action, per_agent),
            log_prob=function(self.log_prob, per_agent),
            advantage=function(self.advantage, per_agent),
            weight=of_scalar_rows(self.weight),
            factor=of_scalar_rows(self.factor),
        )


def flatten_rows(
    inputs: TensorDictBase,
    *,
    action: Tensor | TensorDictBase,
    log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor | None,
    per_agent: bool,
    sequences: bool = False,
    ranks: Ranks,
) -> PolicyRows:
    """Flattens the batch dimensions ``*B`` of a batch to ``N`` rows, or ``[*B, T]`` to ``N`` sequences.

    Args:
        inputs: what the policy reads, batch size ``[*B]`` or ``[*B, T]``.

    Keyword Args:
        action: the actions, ``[*B, *A, action_dim]``.
        log_prob: the log-probabilities as collected, ``[*B, *A, 1]``.
        advantage: the advantages, broadcastable to ``log_prob``.
        mask: which entries count, bool ``[*B, *A, 1]``, or None for all. The others weigh 0, and their content is
            cleared, so that padding, NaNs included, cannot spread into sums or gradients.
        per_agent: whether each agent is a region of its own, with a mean of its own.
        sequences: whether the last batch dimension is time, and stays.
        ranks: the processes whose rows are one batch: the weights of all of them sum to 1.

    Returns:
        The rows.
    """
    batch_size = inputs.batch_size
    log_prob, advantage = at_least_single(log_prob), at_least_single(advantage)
    values = {"log_prob": log_prob, "advantage": advantage.expand_as(log_prob), "action": action}
    rows = TensorDict({**values, "inputs": inputs}, batch_size=batch_size).detach()
    rows = rows.reshape(-1, batch_size[-1]) if sequences else rows.reshape(-1)
    row_dims = rows.batch_dims
    if sequences:
        check_same_length(rows.shape[1], ranks, log_prob.device)
    if mask is None:
        weight = _equal_weight(rows.numel() if per_agent else log_prob.numel(), log_prob, ranks)
    else:
        mask = mask.reshape(rows["log_prob"].shape)
        rows = rows.named_apply(lambda key, value: _clear_masked(key, value, mask, row_dims), nested_keys=True)
        count = ranks.sum_(mask.sum(list(range(row_dims)), keepdim=True) if per_agent else mask.sum())
        weight = mask / count.clamp_min(1).to(log_prob.dtype)
    rows.set("advantage", rows.get("advantage") + _non_finite(rows, row_dims))
    return PolicyRows(
        **{key: rows.get(key) for key in (*values, "inputs")},
        weight=weight,
        factor=log_prob.new_ones(1),
        row_dims=row_dims,
    )


def broadcast_advantage(advantage: Tensor, log_prob: Tensor, key: NestedKey) -> Tensor:
    """Checks an advantage against log-probabilities, and gives one of a whole team to each of its agents.

    Args:
        advantage: the advantage, ``[*B, T, *A, 1]``, or ``[*B, T, 1]`` of a team.
        log_prob: the log-probabilities, ``[*B, T, *A, 1]``.
        key: the advantage's key, for the message.

    Returns:
        The advantage, broadcastable to ``log_prob``.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if advantage.ndim == log_prob.ndim - 1 and advantage.shape[:-1] == log_prob.shape[:-2]:
        advantage = advantage.unsqueeze(-2)
    pairs = zip(advantage.shape, log_prob.shape, strict=False)
    if advantage.ndim != log_prob.ndim or any(size not in {1, legal} for size, legal in pairs):
        raise ValueError(
            f"the advantage {key!r} has shape {tuple(advantage.shape)}, which does not fit log-probabilities of shape "
            f"{tuple(log_prob.shape[:-1])}. Legal: {tuple(log_prob.shape)}, or {(*log_prob.shape[:-2], 1)} for a whole "
            "team."
        )
    return advantage


def collected_log_prob(loss: PPOLoss, tensordict: TensorDictBase) -> Tensor:
    """What the policy that collected the data says of the actions; of composite ones, the sum over their parts.

    Where a log-probability has as many dimensions as its continuous action, it is one of each entry of the action (the
    policy's ``Normal`` is not ``Independent``): the joint action's is their sum.

    Args:
        loss: the loss of the policy.
        tensordict: the data, ``[*B]``.

    Returns:
        ``log π_k(u|o)``, ``[*B, *A, 1]``.

    Raises:
        ValueError: if discrete log-probabilities ``[*B, n]`` may be those of ``n`` agents, or of ``n`` actions of one.
    """
    keys, batch_dims = loss.tensor_keys, tensordict.batch_dims
    log_prob = entry(tensordict, keys.sample_log_prob, LOG_PROB_ROLE)
    action = entry(tensordict, keys.action, "action")
    if is_tensor_collection(log_prob):
        parts = dict(log_prob.items(True, True))
        pairs = [
            (part, tensordict.get((*path(key)[:-1], path(key)[-1].removesuffix("_log_prob")), None))
            for key, part in parts.items()
        ]
    else:
        pairs = [(log_prob, action if isinstance(action, Tensor) else None)]
    agent_dims = []
    for part, own in pairs:
        extra = part.ndim - batch_dims
        if own is None or own.ndim > part.ndim:
            agent_dims.append(extra)
        elif own.is_floating_point():
            agent_dims.append(extra if extra == 1 and _has_agents(loss, tensordict, by_key=False) else extra - 1)
    if not agent_dims:
        extra = max(part.ndim for part, _ in pairs) - batch_dims
        many = any(part.shape[batch_dims:].numel() > 1 for part, _ in pairs)
        if many and not _has_agents(loss, tensordict):
            raise ValueError(
                f"the log-probability {keys.sample_log_prob!r} has shape {tuple(part.shape)} in data of batch size "
                f"{tuple(tensordict.batch_size)}: is it one of each agent, or of each action of one agent? Legal: the "
                "action of several agents in a group, such as ('agents', 'action'); several actions of one agent in a "
                "torchrl_trpo.distributions.MultiCategorical, or a torch.distributions.Independent."
            )
        agent_dims.append(min(extra, 1))
    ndim = batch_dims + max(0, *agent_dims)
    return torch.stack([sum_events(part, ndim) for part, _ in pairs]).sum(0).unsqueeze(-1)


def _has_agents(loss: PPOLoss, tensordict: TensorDictBase, *, by_key: bool = True) -> bool:
    """Whether the data of a loss has an agent dimension: by its networks, its advantage, or its group and its key."""
    action = loss.tensor_keys.action
    group = group_of(action[0] if isinstance(action, list) else action)
    advantage = tensordict.get(loss.tensor_keys.advantage, None)
    return (
        any(isinstance(net, MultiAgentNetBase) for net in loss.actor_network.modules())
        or (advantage is not None and advantage.ndim > tensordict.batch_dims + 1)
        or (group is not None and (by_key or tensordict.get(group).batch_dims > tensordict.batch_dims))
    )


def check_agent_dim(log_prob: Tensor, batch_size: torch.Size, agent_dim: int, n_agents: int) -> None:
    """Checks that log-probabilities are those of all agents of a policy, with the agents after the batch dimensions.

    Args:
        log_prob: the log-probabilities, ``[*B, T, n_agents, 1]``.
        batch_size: the batch dimensions ``[*B, T]``.
        agent_dim: where the agents are said to be.
        n_agents: how many the policy has.

    Raises:
        ValueError: if they are not.
    """
    position = log_prob.ndim + agent_dim if agent_dim < 0 else agent_dim
    legal = (*batch_size, n_agents)
    if position != len(batch_size) or log_prob.shape[:-1] != legal:
        raise ValueError(
            f"the policy has parameters for {n_agents} agents, but the log-probability has shape "
            f"{tuple(log_prob.shape[:-1])} in data of batch size {tuple(batch_size)}, with agent_dim={agent_dim}. "
            f"Legal: {legal}, agents right after the batch dimensions."
        )


def entry(tensordict: TensorDictBase, key: NestedKey | list[NestedKey], role: str) -> Any:
    """An entry that must be there; for a list of keys, a TensorDict of them.

    Args:
        tensordict: the data.
        key: the entry's key, or keys.
        role: what the key is called where it is set, for the message.

    Returns:
        The entry.

    Raises:
        PlainKeyError: if it is not there.
    """
    for name in key if isinstance(key, list) else [key]:
        if tensordict.get(name, None) is None:
            raise PlainKeyError(
                f"{role}: {name!r} is not in the data. {nearest(name, tensordict.keys(True, True))} "
                "Name the entry that is meant where the key is set, or with set_keys."
            )
    return tensordict.select(*key) if isinstance(key, list) else tensordict.get(key)


def at_least_single(value: Tensor) -> Tensor:
    """A floating-point entry in single precision at least: what half precision rounds away adds up over the rows.

    Args:
        value: the entry.

    Returns:
        The entry; the same where it is wide enough, or not floating-point.
    """
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _equal_weight(count: int, like: Tensor, ranks: Ranks) -> Tensor:
    """What each of the rows counts when all count the same, ``[1]``."""
    if ranks.size == 1:
        return like.new_full((1,), 1 / max(count, 1))
    total = ranks.sum_(torch.tensor([count], dtype=torch.long, device=like.device))
    return (1 / total.double()).to(like.dtype)


def _non_finite(rows: TensorDict, row_dims: int) -> Tensor:
    """NaN where anything that belongs to a row is not finite, else 0, ``[*R, *A, 1]``.

    An infinite observation or log-probability may leave the surrogate finite: saturated, or with a ratio of 0.
    """
    log_prob = rows.get("log_prob")
    spread = torch.zeros_like(log_prob)
    for key, value in rows.items(True, True):
        if value.is_floating_point():
            leading = _leading_dims(key, value, log_prob, row_dims)
            found = non_finite(value, leading)
            spread = spread + found.reshape(*found.shape, *[1] * (spread.ndim - leading))
    return spread


def _clear_masked(key: NestedKey, value: Tensor, mask: Tensor, row_dims: int) -> Tensor:
    """Zeros, and for flags (every action is allowed) True, where the mask ``[*R, *A, 1]`` is off."""
    keep = mask.squeeze(-1)  # [*R, *A]
    if keep.ndim > _leading_dims(key, value, mask, row_dims):
        keep = keep.any(dim=row_dims)
    keep = keep.reshape(*keep.shape, *[1] * (value.ndim - keep.ndim))
    if row_dims > 1 and key[0] == "inputs":  # a recurrent policy has read it
        if key[-1] == "is_init":
            return value
        keep = keep | value.isfinite() if value.is_floating_point() else keep
    neutral = torch.ones_like(value) if value.dtype == torch.bool else torch.zeros_like(value)
    return torch.where(keep, value, neutral)


def _leading_dims(key: NestedKey, value: Tensor, like: Tensor, row_dims: int) -> int:
    """How many dimensions of an entry of the rows are rows and agents, where ``like`` is ``[*R, *A, 1]``."""
    agent_dims = like.ndim - 1 - row_dims
    is_input = isinstance(key, tuple) and key[0] == "inputs"
    if agent_dims and is_input and not has_agent_dim(value, like.shape[row_dims], row_dims):
        return row_dims
    return row_dims + agent_dims
