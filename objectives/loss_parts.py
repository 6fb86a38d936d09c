"""What the policy updates have in common with the loss that they belong to: its advantage, mask and entropy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import CompositeDistribution, composite_lp_aggregate
from torch import Tensor
from torch import distributions as D
from torchrl.objectives import PPOLoss

from torchrl_trpo.distributions.divergence import entropy
from torchrl_trpo.errors import PlainKeyError, nearest
from torchrl_trpo.keys import next_key, path
from torchrl_trpo.numerics.statistics import standardize
from torchrl_trpo.objectives.agent_gae import AgentGAE
from torchrl_trpo.objectives.functional import parameters_restored
from torchrl_trpo.parallel.ranks import Ranks


def actor_parameters(loss: PPOLoss) -> TensorDictBase:
    """The parameters and buffers of a loss's policy.

    Args:
        loss: the loss.

    Returns:
        The parameters, as its functional calls use them.
    """
    return loss.actor_network_params if loss.functional else TensorDict.from_module(loss.actor_network)


def check_separate_losses(losses: Mapping[str, PPOLoss]) -> None:
    """Refuses losses of one objective that write the same entries, or whose policies share parameters.

    One team would train on the other's advantages, or be moved by the other's steps.

    Args:
        losses: the losses by group.

    Raises:
        ValueError: if two groups have the same key for the advantage, or with critics for the value or its target; or
            if a parameter is of both policies.
    """
    owners: dict[int, str] = {}
    for group, loss in losses.items():
        for key, value in actor_parameters(loss).items(True, True):
            other = owners.setdefault(id(value), group)
            if value.requires_grad and other != group:
                raise ValueError(
                    f"groups {other!r} and {group!r} share the parameter {key} of their policies: a step of one would "
                    "move the other's policy. Legal: a policy for each group, or one group of all agents."
                )
    taken: dict[tuple[str, NestedKey], str] = {}
    for group, loss in losses.items():
        for name in ["advantage"] if loss.critic_network is None else ["advantage", "value", "value_target"]:
            key = unravel_key(getattr(loss.tensor_keys, name))
            other = taken.setdefault((name, key), group)
            if other != group:
                legal = {member: (member, path(key)[-1]) for member in (other, group)}
                raise ValueError(
                    f"{name}: {key!r} is the key of groups {other!r} and {group!r}: what one's value estimator writes "
                    "there, the other would use. Legal: a key for each group, such as "
                    f"{' and '.join(f'losses[{m!r}].set_keys({name}={own})' for m, own in legal.items())}."
                )


def mask_keys(loss: PPOLoss) -> tuple[NestedKey, ...]:
    """The entries of the data that say what counts for a loss, without what a value estimator itself writes.

    Args:
        loss: the loss.

    Returns:
        The keys.
    """
    return tuple(key for key in loss._loss_mask_keys() if key != "shifted_valid")


def check_padding(loss: PPOLoss, tensordict: TensorDictBase) -> None:
    """Refuses padding that a value estimator which knows no masks has taken for the steps that follow.

    Args:
        loss: the loss.
        tensordict: the data, ``[*B, T]``.

    Raises:
        ValueError: if a step that counts is followed by one that does not, without an end.
    """
    estimator = loss._value_estimator
    masks = [tensordict.get(key, None) for key in mask_keys(loss)]
    masks = [mask for mask in masks if mask is not None]
    done = tensordict.get(next_key(loss.tensor_keys.done), None)
    if estimator is None or isinstance(estimator, AgentGAE) or not masks or done is None or tensordict.batch_dims < 2:
        return
    steps = tensordict.shape[-1]
    counts = torch.stack([mask.reshape(*tensordict.shape, -1).any(-1) for mask in masks]).all(0)
    ends = done.reshape(*tensordict.shape, -1).any(-1)
    if steps > 1 and (counts[..., :-1] & ~counts[..., 1:] & ~ends[..., :-1]).any():
        raise ValueError(
            f"{type(estimator).__name__} does not know the loss's mask: what padded steps were paid is in the "
            "advantages of the steps before them, which do not end. Legal: "
            "make_value_estimator(AgentGAE, mask_key=loss.loss_mask_key, ...), or done flags before the padding."
        )


def estimated_advantage(loss: PPOLoss, tensordict: TensorDictBase) -> tuple[Tensor, bool]:
    """The advantage of a batch, computed by the loss's value estimator if it is missing.

    Args:
        loss: the loss.
        tensordict: the data, ``[*B, T]``; a missing advantage and value target are written into it.

    Returns:
        The advantage, ``[*B, T, n_agents, 1]`` (without agents ``[*B, T, 1]``), and whether it was missing.

    Raises:
        PlainKeyError: if there is neither an advantage nor a critic to compute it with.
        ValueError: if the advantage misses its last dimension of size 1.
    """
    key = loss.tensor_keys.advantage
    advantage = tensordict.get(key, None)
    missing = advantage is None
    if missing:
        if loss.critic_network is None and loss._value_estimator is None:
            raise PlainKeyError(
                f"the advantage {key!r} is not in the data, and the loss has no critic to compute it with. Give "
                f"{type(loss).__name__} a critic_network, compute the advantage first, or name its key with "
                f"set_keys(advantage=...). {nearest(key, tensordict.keys(True, True))}"
            )
        params = loss._cached_critic_network_params_detached if loss.critic_network is not None else None
        target_params = loss.target_critic_network_params if params is not None else None
        with parameters_restored(loss.critic_network):
            loss.value_estimator(tensordict, params=params, target_params=target_params)
        advantage = tensordict.get(key)
    if advantage.ndim <= tensordict.batch_dims or advantage.shape[-1] != 1:
        raise ValueError(
            f"the advantage {key!r} has shape {tuple(advantage.shape)} in data of batch size "
            f"{tuple(tensordict.batch_size)}, which would make the objective an outer product over samples. Legal: "
            "[*B, T, 1] or [*B, T, n_agents, 1]. Use advantage.unsqueeze(-1)."
        )
    return advantage, missing


def standardized_advantage(loss: PPOLoss, advantage: Tensor, tensordict: TensorDictBase, ranks: Ranks) -> Tensor:
    """The advantage with mean 0 and standard deviation 1 over the rows that count, of all ranks.

    Args:
        loss: the loss, with the dimensions that are not averaged over (``normalize_advantage_exclude_dims``).
        advantage: the advantage, ``[*B, T, n_agents, 1]``.
        tensordict: the data, with the loss's masks.
        ranks: the processes whose rows belong together.

    Returns:
        The advantage.

    Raises:
        ValueError: if a batch or time dimension is not averaged over.
    """
    excluded = {dim % advantage.ndim for dim in loss.normalize_advantage_exclude_dims}
    rows = sorted(dim for dim in excluded if dim < tensordict.batch_dims)
    if rows:
        raise ValueError(
            f"normalize_advantage_exclude_dims: {tuple(loss.normalize_advantage_exclude_dims)} names dimension "
            f"{rows[0]} of an advantage of shape {tuple(advantage.shape)}, which is a batch or time dimension of "
            f"{tuple(tensordict.batch_size)}: each of its {advantage.shape[rows[0]]} entries would be normalised "
            "alone. Legal: dimensions behind those, as the agents' in [*B, T, n_agents, 1]; () for one agent."
        )
    dims = [dim for dim in range(advantage.ndim) if dim not in excluded]
    return standardize(advantage, row_mask(loss, tensordict, advantage), dims, ranks)


def row_mask(loss: PPOLoss, tensordict: TensorDictBase, like: Tensor) -> Tensor | None:
    """Which entries count, by the loss's masks.

    Args:
        loss: the loss.
        tensordict: the data.
        like: an entry of the shape that is asked for.

    Returns:
        The mask, bool, or None where the data has none.
    """
    masks = [tensordict.get(key, None) for key in loss._loss_mask_keys()]
    masks = [loss._expand_loss_mask(mask, like) for mask in masks if mask is not None]
    return torch.stack(masks).all(0) if masks else None


def exact_entropy(dist: D.Distribution, batch_size: torch.Size) -> Tensor | TensorDict:
    """The entropy without sampling, in the form that ``PPOLoss`` has it.

    Args:
        dist: a distribution with an exact entropy.
        batch_size: its batch shape, ``[*B]``.

    Returns:
        The entropy, ``[*B, 1]``; of a composite distribution whose log-probabilities are by part, that of each part.
    """
    if not isinstance(dist, CompositeDistribution) or composite_lp_aggregate():
        return entropy(dist, len(batch_size)).unsqueeze(-1)
    parts = {(*path(name)[:-1], f"{path(name)[-1]}_entropy"): entropy(dist[name]) for name in dist}
    return TensorDict(parts, batch_size=batch_size).unsqueeze(-1)
