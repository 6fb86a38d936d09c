"""Fitting the critic: a few epochs of minibatches on the value targets."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import PPOLoss

from torchrl_trpo.layout import finite_where_masked, non_finite, reads_init


def fit_critics(
    losses: Iterable[PPOLoss],
    optimizer: torch.optim.Optimizer,
    data: TensorDictBase,
    *,
    epochs: int,
    minibatch_size: int,
) -> dict[str, float]:
    """Fits the critics of several groups one after the other, as :func:`fit_critic` does.

    Args:
        losses: the losses of the groups.
        optimizer: over the parameters of all critics.
        data: the batch with value targets, ``[*B, T]``; not modified.

    Keyword Args:
        epochs: the number of passes over the batch.
        minibatch_size: rows (environment steps) per gradient step.

    Returns:
        The means over the groups of what :func:`fit_critic` returns; of ``dropped``, the sum.
    """
    fits = [fit_critic(loss, optimizer, data, epochs=epochs, minibatch_size=minibatch_size) for loss in losses]
    total = {name: sum(fit[name] for fit in fits) for name in fits[0]}
    return {name: value if name == "dropped" else value / len(fits) for name, value in total.items()}


def fit_critic(
    loss: PPOLoss, optimizer: torch.optim.Optimizer, data: TensorDictBase, *, epochs: int, minibatch_size: int
) -> dict[str, float]:
    """Regresses the critic on the value targets of a batch.

    Rows that a loss mask excludes, and rows with anything that is not finite, are left out: one NaN would make every
    parameter of the critic NaN, for good. A recurrent critic is fitted on whole sequences; of those, the ones with
    anything that is not finite where the mask counts.

    Args:
        loss: the loss whose critic is fitted; its ``loss_critic`` gives the distance.
        optimizer: over the critic's parameters.
        data: the batch with value targets, ``[*B, T]``; not modified.

    Keyword Args:
        epochs: the number of passes over the batch.
        minibatch_size: rows (environment steps) per gradient step.

    Returns:
        ``loss_critic``, the mean over the last epoch, ``explained_variance`` of the targets by the values that the
        advantages were computed with, and ``dropped``, the number of rows left out for what is not finite.
    """
    rows, counted, has_masks = _rows_of_fit(loss, data)
    names = [name for name in rows.keys(True, True) if rows.get(name).is_floating_point()]
    finite = torch.ones(len(rows), dtype=torch.bool, device=counted.device)
    for name in names:
        value = rows.get(name)
        value = finite_where_masked(value, counted) if has_masks else value
        finite &= non_finite(value, 1) == 0
    counts = counted.flatten(1).any(1)
    dropped = int((counts & ~finite).sum()) * rows.shape[1:].numel()
    kept = (counts & finite).nonzero().squeeze(-1)
    if len(kept) == 0:
        return {"loss_critic": math.nan, "explained_variance": math.nan, "dropped": dropped}
    target, value = (
        rows.get(key)[kept][counted[kept]] for key in (loss.tensor_keys.value_target, loss.tensor_keys.value)
    )
    unexplained = (target - value).var() / target.var()
    if rows.batch_dims > 1:
        minibatch_size = max(1, minibatch_size // rows.shape[1])
    total = target.new_zeros(())
    steps = 0
    for epoch in range(epochs):
        for drawn in torch.randperm(len(kept), device=kept.device).split(minibatch_size):
            batch = rows[kept[drawn]]
            if has_masks:
                batch.update({name: finite_where_masked(batch.get(name), counted[kept[drawn]]) for name in names})
            with set_recurrent_mode(True):
                loss_critic = loss._reduce_loss(loss.loss_critic(batch)[0], batch, reduction="mean")
            optimizer.zero_grad()
            loss_critic.backward()
            optimizer.step()
            if epoch == epochs - 1:
                total += loss_critic.detach()
                steps += 1
    return {
        "loss_critic": float(total / steps),
        "explained_variance": float(1 - unexplained),
        "dropped": dropped,
    }


def _rows_of_fit(loss: PPOLoss, data: TensorDictBase) -> tuple[TensorDict, Tensor, bool]:
    """What the fit reads, ``[N]`` or for a recurrent critic ``[N, T]``: views on the batch.

    Returns:
        The rows; which of their values count, bool ``[*R, n_agents]``; whether a mask says so.
    """
    keys = loss.tensor_keys
    recurrent = reads_init(loss.critic_network)
    masks = {name: mask for name in loss._loss_mask_keys() if (mask := data.get(name, None)) is not None}
    names = [*loss.critic_network.in_keys, keys.value_target, keys.value, *masks]
    present = {name: value for name in names if (value := data.get(name, None)) is not None}
    rows = TensorDict(present, batch_size=data.batch_size)
    rows = rows.reshape(-1, data.batch_size[-1]) if recurrent else rows.reshape(-1)
    target = rows.get(keys.value_target)
    counted = torch.ones_like(target, dtype=torch.bool)
    for name in masks:
        counted &= loss._expand_loss_mask(rows.get(name), target)
    return rows, counted.reshape(*rows.batch_size, -1), bool(masks)
