"""Fitting critics: a few epochs of minibatches on the value targets."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import PPOLoss

from torchrl_trpo.arguments import positive_whole
from torchrl_trpo.keys import entry, finite_where_masked, non_finite, reads_init
from torchrl_trpo.numerics.statistics import read, variance
from torchrl_trpo.objectives.loss_groups import by_group, check_own_entries
from torchrl_trpo.objectives.minibatch_gradient import MinibatchGradient
from torchrl_trpo.objectives.policy_update import (
    critic_network_parameters,
    mask_keys,
    mean_critic_loss,
    row_mask,
    trained,
)
from torchrl_trpo.objectives.recorded_loss import MeanLoss
from torchrl_trpo.parallel.minibatches import average_gradients, count_by_rank, draw_minibatches
from torchrl_trpo.parallel.ranks import Ranks, check_same_length

_FEWEST_STEPS = 50  # of a fit for which recording pays


def fit_critics(
    losses: Iterable[PPOLoss],
    optimizer: torch.optim.Optimizer,
    data: TensorDictBase,
    *,
    epochs: int,
    minibatch_size: int,
    compiled: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Fits the critics of several groups, one after the other, with :func:`fit_critic`.

    It is an error if two losses read the same entry: one critic would be fitted on the other's targets.

    Args:
        losses: the losses of the groups.
        optimizer: over the parameters of all critics.
        data: the batch with value targets, ``[*B, T]``; not modified.

    Keyword Args:
        epochs: the number of passes over the batch.
        minibatch_size: rows (environment steps) per gradient step, of all processes together.
        compiled: whether gradients are compiled with the machine's C++ compiler, in a fit of at least 50 minibatches.
            They are equal up to rounding. Recurrent critics, losses with a ``value_norm`` and batches with a mask stay
            as they are. If another one cannot be compiled, a warning says why.
        process_group: the processes that fit together. Default: this one alone.

    Returns:
        What :func:`fit_critic` returns, averaged over the groups; ``dropped`` is summed.
    """
    groups = by_group(losses)
    check_own_entries(groups, ["value", "value_target"])
    settings: Any = {"minibatch_size": minibatch_size, "compiled": compiled, "process_group": process_group}
    fits = [fit_critic(loss, optimizer, data, epochs=epochs, **settings) for loss in groups.values()]
    total = {name: sum(fit[name] for fit in fits) for name in fits[0]}
    return {name: value if name == "dropped" else value / len(fits) for name, value in total.items()}


def fit_critic(
    loss: PPOLoss,
    optimizer: torch.optim.Optimizer,
    data: TensorDictBase,
    *,
    epochs: int,
    minibatch_size: int,
    compiled: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Regresses the critic on the value targets of a batch.

    Rows that a loss mask excludes and rows with non-finite numbers are left out: one NaN would make every parameter of
    the critic NaN, for good. A recurrent critic is fitted on whole sequences; a sequence is left out if it has
    non-finite numbers where the mask counts.

    With a ``process_group``, minibatches are drawn from the rows of all processes, and each process computes its rows'
    part of the gradient. The steps are those of one process with all rows, up to rounding.

    Args:
        loss: the loss whose critic is fitted, by its ``loss_critic``.
        optimizer: over the critic's parameters.
        data: the batch with value targets, ``[*B, T]``; not modified.

    Keyword Args:
        epochs: the number of passes over the batch.
        minibatch_size: rows (environment steps) per gradient step, of all processes together.
        compiled: whether gradients are compiled with the machine's C++ compiler, in a fit of at least 50 minibatches.
            They are equal up to rounding. Recurrent critics, losses with a ``value_norm`` and batches with a mask stay
            as they are. If another one cannot be compiled, a warning says why.
        process_group: the processes that fit together. Default: this one alone.

    Returns:
        ``loss_critic``, the mean over the last epoch; ``explained_variance`` of the targets by the values that the
        advantages were computed with; and ``dropped``, the number of rows left out because they are not finite.

    Raises:
        ValueError: if ``epochs`` or ``minibatch_size`` is below 1, or the loss has a ``value_norm`` that would differ
            from process to process.
    """
    epochs, minibatch_size = positive_whole("epochs", epochs), positive_whole("minibatch_size", minibatch_size)
    rows, counted, has_masks = _rows_of_fit(loss, data)
    names = [name for name in rows.keys(True, True) if rows.get(name).is_floating_point()]
    finite = torch.ones(len(rows), dtype=torch.bool, device=counted.device)
    for name in names:
        if has_masks:
            rows.set(name, finite_where_masked(rows.get(name), counted))
        finite &= non_finite(rows.get(name), 1) == 0
    counts = counted.flatten(1).any(1)
    ranks = Ranks(process_group)
    update_value_norm = getattr(loss, "update_value_norm", None)
    if ranks.size > 1 and update_value_norm is None and getattr(loss, "value_norm", None) is not None:
        raise ValueError(
            f"value_norm: that of {type(loss).__name__} would differ from process to process. Use TRPOLoss."
        )
    dropped = ranks.sum_((counts & ~finite).sum()) * rows.shape[1:].numel()
    kept = (counts & finite).nonzero().squeeze(-1)
    kept_by_rank = count_by_rank(kept, ranks)
    if sum(kept_by_rank) == 0:
        return {"loss_critic": math.nan, "explained_variance": math.nan, "dropped": int(dropped)}
    estimates = [rows.get(key)[kept] for key in (loss.tensor_keys.value_target, loss.tensor_keys.value)]
    target, value = torch.stack(estimates)[:, counted[kept]]
    unexplained = variance(target - value, ranks) / variance(target, ranks)
    if rows.batch_dims > 1:
        check_same_length(rows.shape[1], ranks, rows.device or target.device)
        minibatch_size = max(1, minibatch_size // rows.shape[1])
    parameters = trained_parameters(loss)
    steps_of_fit = epochs * math.ceil(len(kept) / minibatch_size)
    gradient = _minibatch_gradient(loss, parameters, steps_of_fit, compiled and not has_masks)
    total = target.new_zeros(())
    steps = 0
    for epoch in range(epochs):
        for drawn in draw_minibatches(kept, kept_by_rank, minibatch_size, ranks):
            optimizer.zero_grad()
            loss_critic = total.new_zeros(())
            if len(drawn):
                loss_critic = gradient(rows, drawn)
            elif update_value_norm is not None:
                update_value_norm(rows[drawn])  # with the targets of the ranks that have some
            loss_critic = average_gradients(parameters, loss_critic, counted, drawn, ranks)
            optimizer.step()
            if epoch == epochs - 1:
                total += loss_critic
                steps += 1
    return {
        **read({"loss_critic": total / steps, "explained_variance": 1 - unexplained}),
        "dropped": int(dropped),
    }


def _minibatch_gradient(loss: PPOLoss, parameters: list[Tensor], steps: int, compiled: bool) -> MinibatchGradient:
    """The gradient of the critic's loss, recorded unless a call changes the loss, or the fit or the critic is long."""
    may_record = (
        steps >= _FEWEST_STEPS
        and getattr(loss, "value_norm", None) is None
        and not reads_init(loss.critic_network)
        and all(leaf.requires_grad for leaf in critic_network_parameters(loss).values(True, True))
    )
    mean = MeanLoss(loss, loss.critic_network, functools.partial(mean_critic_loss, loss), parameters)
    return MinibatchGradient("The critic's fit", mean, may_record=may_record, compiled=compiled)


def critic_optimizer(losses: Iterable[PPOLoss], *, lr: float) -> torch.optim.Adam:
    """The recipes' optimiser of the critics.

    Args:
        losses: the losses of the groups, whose critics share no parameter with the policies.

    Keyword Args:
        lr: the learning rate.

    Returns:
        Adam over the parameters of all critics.
    """
    parameters = [parameter for loss in losses for parameter in trained_parameters(loss)]
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def trained_parameters(loss: PPOLoss) -> list[Tensor]:
    """The critic's trained parameters, including those that it shares with the policy.

    Args:
        loss: a loss with a critic.

    Returns:
        The parameters, each once.
    """
    return trained(critic_network_parameters(loss))


def _rows_of_fit(loss: PPOLoss, data: TensorDictBase) -> tuple[TensorDict, Tensor, bool]:
    """The entries that the fit reads, as views on the batch: ``[N]``, or ``[N, T]`` for a recurrent critic.

    Returns:
        The rows; which of their values count, bool ``[*R, n_agents]``; whether there is a mask.
    """
    keys = loss.tensor_keys
    recurrent = reads_init(loss.critic_network)
    for name in ("value_target", "value"):
        entry(data, getattr(keys, name), f"{name}, which loss.value_estimator(data) writes")
    names = [*loss.critic_network.in_keys, keys.value_target, keys.value, *mask_keys(loss)]
    present = {name: value for name in names if (value := data.get(name, None)) is not None}
    rows = TensorDict(present, batch_size=data.batch_size)
    rows = rows.reshape(-1, data.batch_size[-1]) if recurrent else rows.reshape(-1)
    target = rows.get(keys.value_target)
    mask = row_mask(loss, rows, target)
    counted = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    return rows, counted.reshape(*rows.batch_size, -1), mask is not None
