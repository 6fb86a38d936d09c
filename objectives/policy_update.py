"""What the policy updates share: reading a batch, what they refuse, masks, advantages and entropies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import CompositeDistribution, ProbabilisticTensorDictSequential, composite_lp_aggregate
from torch import Tensor
from torch import distributions as D
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import PPOLoss
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS
from torchrl.objectives.value import ValueEstimatorBase

from torchrl_trpo.distributions.divergence import entropy
from torchrl_trpo.errors import PlainKeyError, nearest
from torchrl_trpo.keys import entry, next_key, path, reads_init, time_of
from torchrl_trpo.numerics.statistics import standardize
from torchrl_trpo.objectives.agent_checks import common_entries
from torchrl_trpo.objectives.agent_gae import AgentGAE
from torchrl_trpo.objectives.collected import (
    action_group,
    broadcast_advantage,
    check_agent_dim,
    collected_log_prob,
)
from torchrl_trpo.objectives.functional import parameters_restored
from torchrl_trpo.objectives.policy_network import distribution_keys, distribution_parameters, input_keys
from torchrl_trpo.objectives.policy_rows import PolicyRows, flatten_rows
from torchrl_trpo.parallel.ranks import Ranks


def read_rows(
    loss: PPOLoss,
    tensordict: TensorDictBase,
    normalize: Callable[[Tensor, TensorDictBase, bool], Tensor],
    *,
    n_agents: int | None,
    agent_dim: int = -2,
    log_prob_keys: Sequence[NestedKey] = (),
    ranks: Ranks,
) -> PolicyRows:
    """What a policy update reads of a batch ``[*B, T]``, flattened to ``N`` rows; the batch is not modified.

    ``normalize`` gets the advantage ``[*B, T, *A, 1]``, the data, and whether the advantage was missing and has been
    computed. ``n_agents`` is how many agents have a region each, or None for one region, and ``agent_dim`` is their
    dimension in the log-probability ``[*B, T, n_agents, 1]``. The recorded ``log_prob_keys``, ``[*B, T, *A]``, are
    added to the rows' ``inputs`` with a last dimension of 1. Rows that a loss mask excludes weigh 0, and their content
    cannot spread. What agents read of each other is not theirs alone: it counts where any of them does. Raises
    ValueError if the data is empty, a shape does not fit, or the value estimator does not know the mask.
    """
    if 0 in tensordict.batch_size:
        raise ValueError(f"the data is empty: its batch size is {tuple(tensordict.batch_size)}.")
    sequences = reads_init(loss.actor_network)
    if sequences and time_of(tensordict) != tensordict.ndim - 1:
        raise ValueError(
            f"the data's dimensions are named {tuple(tensordict.names)}. A recurrent policy reads sequences along the "
            "last dimension: [*B, T]."
        )
    tensordict = tensordict.clone(False)
    keys = loss.tensor_keys
    advantage, computed = estimated_advantage(loss, tensordict)
    check_masks(loss, tensordict)
    log_prob = collected_log_prob(loss, tensordict)
    if n_agents is not None:
        check_agent_dim(log_prob, tensordict.batch_size, agent_dim, n_agents)
    advantage = normalize(
        broadcast_advantage(advantage, log_prob, keys.advantage, tensordict.batch_dims), tensordict, computed
    )
    inputs = entry(tensordict, input_keys(loss.actor_network), "the actor's in_keys")
    for key in log_prob_keys:
        inputs.update(tensordict.select(key).apply(lambda value: value.unsqueeze(-1)))
    mask, group = row_mask(loss, tensordict, log_prob), action_group(loss)
    flatten = functools.partial(
        flatten_rows,
        inputs,
        action=entry(tensordict, keys.action, "action"),
        log_prob=log_prob,
        advantage=advantage,
        mask=mask,
        group=group,
        per_agent=n_agents is not None,
        sequences=sequences,
        ranks=ranks,
    )
    rows = flatten()
    in_doubt = [
        key
        for key in (("inputs", *path(name)) for name in rows.inputs.keys(True, True))
        if any(key[: len(own)] == own for own in rows.agent_entries)
        and (mask is not None or (n_agents is not None and key[1] != group))
    ]
    common = common_entries(loss.actor_network, actor_parameters(loss), rows, in_doubt, ranks)
    return flatten(common=common) if common else rows


def actor_parameters(loss: PPOLoss) -> TensorDictBase:
    """The parameters and buffers of a loss's policy, whether the loss is functional or not."""
    return loss.actor_network_params if loss.functional else TensorDict.from_module(loss.actor_network)


def critic_network_parameters(loss: PPOLoss) -> TensorDictBase:
    """The parameters and buffers of a loss's critic, whether the loss is functional or not."""
    return loss.critic_network_params if loss.functional else TensorDict.from_module(loss.critic_network)


def trained(parameters: TensorDictBase) -> list[Tensor]:
    """The parameters that require a gradient, each once."""
    return list({id(leaf): leaf for leaf in parameters.values(True, True) if leaf.requires_grad}.values())


def trained_keys(parameters: TensorDictBase) -> list[NestedKey]:
    """The keys of the parameters that require a gradient."""
    return [key for key, leaf in parameters.items(True, True) if leaf.requires_grad]


def collected_distribution(
    network: ProbabilisticTensorDictSequential, tensordict: TensorDictBase
) -> D.Distribution | None:
    """The policy's distribution as it was at collection, from the parameters that it wrote; None without them."""
    keys = distribution_keys(network)
    if any(tensordict.get(key, None) is None for key in keys):
        return None
    return network.build_dist_from_params(tensordict.select(*keys))


def current_distribution(loss: PPOLoss, inputs: TensorDictBase) -> D.Distribution:
    """The policy's distribution at the current parameters, for inputs of batch size ``[*B]``."""
    dist_params = distribution_parameters(loss.actor_network, actor_parameters(loss), inputs)
    return loss.actor_network.build_dist_from_params(dist_params)


def current_estimator(loss: PPOLoss) -> ValueEstimatorBase | None:
    """The value estimator that a loss has already, or None."""
    return loss._value_estimator  # private: the public value_estimator makes a default one


# ------------------------------------------------------------------ masks


def mask_keys(loss: PPOLoss) -> tuple[NestedKey, ...]:
    """The entries of the data that a loss takes as masks."""
    key = loss.loss_mask_key
    if key is None:
        return ()
    return AUTO_LOSS_MASK_KEYS if key == "auto" else (key,)


def estimator_mask_keys(loss: PPOLoss) -> tuple[NestedKey, ...]:
    """The loss's masks that a value estimator must know: all but the one that estimators write themselves."""
    return tuple(key for key in mask_keys(loss) if key != "shifted_valid")


def row_mask(loss: PPOLoss, tensordict: TensorDictBase, like: Tensor) -> Tensor | None:
    """Which entries count, by the loss's masks: bool of the shape of ``like``, or None if the data has no mask."""
    masks = []
    for key in mask_keys(loss):
        is_found = loss.loss_mask_key == "auto"
        mask = tensordict.get(key, None) if is_found else entry(tensordict, key, "loss_mask_key")
        if mask is not None:
            dim = tensordict.batch_dims
            if mask.shape[dim:].numel() > 1 and like.shape[dim:].numel() == 1:
                mask = mask.any(dim, keepdim=True)  # a team's entry counts if one of the agents does
            # private: the rule by which TorchRL's losses give a mask the shape of a loss has no public name
            masks.append(loss._expand_loss_mask(mask, like))
    return torch.stack(masks).all(0) if masks else None


def mean_critic_loss(loss: PPOLoss, tensordict: TensorDictBase) -> Tensor:
    """The mean of a loss's ``loss_critic`` over what its masks let count, as its ``forward`` has it, a scalar."""
    with set_recurrent_mode(True):
        distance = loss.loss_critic(tensordict)[0]
    return loss._reduce_loss(distance, tensordict, reduction="mean")  # private: a masked mean has no public name


def check_masks(loss: PPOLoss, tensordict: TensorDictBase) -> None:
    """Refuses a value estimator that does not know the loss's mask, if masked steps are in the advantages of others.

    Raises ValueError if an :class:`AgentGAE` has other masks; or if another estimator has none, and a step that counts
    is followed by one that does not, without an end of the episode.
    """
    estimator, keys = current_estimator(loss), estimator_mask_keys(loss)
    if isinstance(estimator, AgentGAE):
        if not {*keys} <= {*estimator.mask_keys}:
            raise ValueError(
                f"the loss of {loss.tensor_keys.action!r} has loss_mask_key={loss.loss_mask_key!r}, and its value "
                f"estimator reads {list(estimator.mask_keys)}: masked steps would be in the advantages of the others. "
                f"Legal: make_value_estimator({type(estimator).__name__}, mask_key=loss.loss_mask_key, ...), or the "
                "estimator's mask as loss.loss_mask_key."
            )
        return
    masks = [mask for key in keys if (mask := tensordict.get(key, None)) is not None]
    done = tensordict.get(next_key(loss.tensor_keys.done), None)
    if estimator is None or not masks or done is None or tensordict.batch_dims < 2:
        return
    counts = torch.stack([mask.reshape(*tensordict.shape, -1).any(-1) for mask in masks]).all(0)
    ends = done.reshape(*tensordict.shape, -1).any(-1)
    counts, ends = (flags.movedim(time_of(tensordict), -1) for flags in (counts, ends))
    if (counts[..., :-1] & ~counts[..., 1:] & ~ends[..., :-1]).any():
        raise ValueError(
            f"{type(estimator).__name__} does not know the loss's mask: the rewards of padded steps are in the "
            "advantages of the steps before them, at which no episode ends. Legal: "
            "make_value_estimator(AgentGAE, mask_key=loss.loss_mask_key, ...), or done flags before the padding."
        )


# ------------------------------------------------------------------ advantages and entropies


def run_value_estimator(loss: PPOLoss, tensordict: TensorDictBase) -> None:
    """Writes values, advantages and value targets into the data ``[*B, T]``, with the loss's value estimator."""
    params = loss.critic_network_params
    with parameters_restored(loss.critic_network):
        loss.value_estimator(
            tensordict,
            params=None if params is None else params.detach(),
            target_params=None if params is None else loss.target_critic_network_params,
        )


def estimated_advantage(loss: PPOLoss, tensordict: TensorDictBase) -> tuple[Tensor, bool]:
    """The advantage ``[*B, T, n_agents, 1]`` (without agents ``[*B, T, 1]``), and whether it was missing.

    A missing one is computed by the loss's value estimator and written into the data, with the value target. Raises
    PlainKeyError if there is no critic to compute it with; ValueError if its last dimension is not of size 1.
    """
    key = loss.tensor_keys.advantage
    advantage = tensordict.get(key, None)
    missing = advantage is None
    if missing:
        if loss.critic_network is None and current_estimator(loss) is None:
            raise PlainKeyError(
                f"the advantage {key!r} is not in the data, and the loss has no critic to compute it with. Give "
                f"{type(loss).__name__} a critic_network, compute the advantage first, or name its key with "
                f"set_keys(advantage=...). {nearest(key, tensordict.keys(True, True))}"
            )
        run_value_estimator(loss, tensordict)
        advantage = tensordict.get(key)
    if advantage.ndim <= tensordict.batch_dims or advantage.shape[-1] != 1:
        raise ValueError(
            f"the advantage {key!r} has shape {tuple(advantage.shape)} in data of batch size "
            f"{tuple(tensordict.batch_size)}, which would make the objective an outer product over samples. Legal: "
            "[*B, T, 1] or [*B, T, n_agents, 1]. Use advantage.unsqueeze(-1)."
        )
    return advantage, missing


def standardized_advantage(loss: PPOLoss, advantage: Tensor, tensordict: TensorDictBase, ranks: Ranks) -> Tensor:
    """The advantage ``[*B, T, n_agents, 1]`` with mean 0 and deviation 1 over the rows that count, of all ranks.

    Raises ValueError if ``normalize_advantage_exclude_dims`` names a batch or time dimension.
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


def exact_entropy(dist: D.Distribution, batch_size: torch.Size) -> Tensor | TensorDict:
    """The entropy without sampling, ``[*B, 1]``, as ``PPOLoss`` has it: of some composite distributions by part."""
    if not isinstance(dist, CompositeDistribution) or composite_lp_aggregate():
        return entropy(dist, len(batch_size)).unsqueeze(-1)
    parts = {(*path(name)[:-1], f"{path(name)[-1]}_entropy"): entropy(dist[name]) for name in dist}
    return TensorDict(parts, batch_size=batch_size).unsqueeze(-1)
