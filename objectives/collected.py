"""What a batch holds of the policy that collected it: log-probabilities, their agents, advantages that fit them."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from torch import Tensor
from torchrl.modules.models.multiagent import MultiAgentNetBase
from torchrl.objectives import PPOLoss

from torchrl_trpo.distributions.divergence import sum_events
from torchrl_trpo.errors import PlainKeyError
from torchrl_trpo.keys import entry, group_of, path


def collected_log_prob(loss: PPOLoss, tensordict: TensorDictBase) -> Tensor:
    """``log π_k(u|o)`` of the actions under the policy that collected them, ``[*B, *A, 1]``.

    Of composite actions it is the sum over their parts. Where it has as many dimensions as its continuous action, there
    is one for each entry of the action (the policy's ``Normal`` is not ``Independent``), and they are summed. Raises
    ValueError if others, ``[*B, n]``, may be those of ``n`` agents, or of ``n`` actions of one.
    """
    keys, batch_dims = loss.tensor_keys, tensordict.batch_dims
    try:
        log_prob = entry(tensordict, keys.sample_log_prob, "sample_log_prob")
    except PlainKeyError:
        if any("log_prob" in path(key)[-1] for key in tensordict.keys(True)):
            raise
        raise PlainKeyError(
            f"the log-probability {keys.sample_log_prob!r} is not in the data, nor any other. Legal: data that a "
            "policy with return_log_prob=True has collected, as ProbabilisticActor(..., return_log_prob=True)."
        ) from None
    action = entry(tensordict, keys.action, "action")
    pairs = [(log_prob, action if isinstance(action, Tensor) else None)]
    if is_tensor_collection(log_prob):
        pairs = [
            (part, tensordict.get((*path(key)[:-1], path(key)[-1].removesuffix("_log_prob")), None))
            for key, part in log_prob.items(True, True)
        ]
    agent_dims = []
    for part, own in pairs:
        extra = part.ndim - batch_dims
        if own is not None and own.ndim <= part.ndim and own.is_floating_point():
            agent_dims.append(extra if extra == 1 and _has_agents(loss, tensordict, by_key=False) else extra - 1)
    if not agent_dims:
        extra = max(part.ndim for part, _ in pairs) - batch_dims
        many = any(part.shape[batch_dims:].numel() > 1 for part, _ in pairs)
        if many and not _has_agents(loss, tensordict) and not _reads_as_agents(loss, tensordict, part):
            raise ValueError(
                f"the log-probability {keys.sample_log_prob!r} has shape {tuple(part.shape)} in data of batch size "
                f"{tuple(tensordict.batch_size)}: is it one of each agent, or of each action of one agent? Legal: the "
                "action of several agents in a group, such as ('agents', 'action'), whose TensorDict has the batch "
                "size [*B, n_agents], or with an advantage [*B, n_agents, 1]; several actions of one agent in a "
                "torchrl_trpo.distributions.MultiCategorical, or a torch.distributions.Independent."
            )
        agent_dims.append(min(extra, 1))
    ndim = batch_dims + max(0, *agent_dims)
    return torch.stack([sum_events(part, ndim) for part, _ in pairs]).sum(0).unsqueeze(-1)


def broadcast_advantage(advantage: Tensor, log_prob: Tensor, key: NestedKey, batch_dims: int) -> Tensor:
    """The advantage, broadcastable to ``log_prob``, ``[*B, T, *A, 1]``; a team's, ``[*B, T, 1]``, goes to each agent.

    Raises ValueError if the shapes do not fit; the message names ``key``.
    """
    if advantage.ndim == log_prob.ndim - 1 and advantage.shape[:-1] == log_prob.shape[:-2]:
        advantage = advantage.unsqueeze(-2)
    pairs = zip(advantage.shape, log_prob.shape, strict=False)
    if advantage.ndim != log_prob.ndim or any(size not in {1, legal} for size, legal in pairs):
        has_agents = log_prob.ndim > batch_dims + 1
        of_team = f", or {(*log_prob.shape[:-2], 1)} for a whole team" if has_agents else ""
        raise ValueError(
            f"the advantage {key!r} has shape {tuple(advantage.shape)}, which does not fit log-probabilities of shape "
            f"{tuple(log_prob.shape[:-1])}. Legal: {tuple(log_prob.shape)}{of_team}."
        )
    return advantage


def check_agent_dim(log_prob: Tensor, batch_size: torch.Size, agent_dim: int, n_agents: int) -> None:
    """Checks that log-probabilities ``[*B, T, n_agents, 1]`` are of all agents of a policy, at ``agent_dim``."""
    position = log_prob.ndim + agent_dim if agent_dim < 0 else agent_dim
    legal = (*batch_size, n_agents)
    if position != len(batch_size) or log_prob.shape[:-1] != legal:
        raise ValueError(
            f"the policy has parameters for {n_agents} agents, but the log-probability has shape "
            f"{tuple(log_prob.shape[:-1])} in data of batch size {tuple(batch_size)}, with agent_dim={agent_dim}. "
            f"Legal: {legal}, agents right after the batch dimensions."
        )


def action_group(loss: PPOLoss) -> str | None:
    """The group of the agents whose actions a loss is of; None for actions at the root."""
    action = loss.tensor_keys.action
    return group_of(action[0] if isinstance(action, list) else action)


def _reads_as_agents(loss: PPOLoss, tensordict: TensorDictBase, log_prob: Tensor) -> bool:
    """Whether all that the policy reads is ``[*B, n, F]``, as the log-probability is ``[*B, n]``."""
    dim = tensordict.batch_dims
    read = [tensordict.get(key, None) for key in loss.actor_network.in_keys]
    tensors = [value for value in read if isinstance(value, Tensor)]
    return bool(tensors) and all(value.shape[dim:-1][:1] == log_prob.shape[dim : dim + 1] for value in tensors)


def _has_agents(loss: PPOLoss, tensordict: TensorDictBase, *, by_key: bool = True) -> bool:
    """Whether the data of a loss has an agent dimension: by its networks, its advantage, or its group and its key.

    The key does not count if all that the policy reads is ``[*B, F]``: that of one agent.
    """
    group, batch_dims = action_group(loss), tensordict.batch_dims
    advantage = tensordict.get(loss.tensor_keys.advantage, None)
    read = [tensordict.get(key, None) for key in loss.actor_network.in_keys]
    ndims = [value.ndim for value in read if isinstance(value, Tensor)]
    return (
        any(isinstance(net, MultiAgentNetBase) for net in loss.actor_network.modules())
        or (advantage is not None and advantage.ndim > batch_dims + 1)
        or (group is not None and by_key and not (ndims and max(ndims) == batch_dims + 1))
        or (group is not None and tensordict.get(group).batch_dims > batch_dims)
    )
