"""Fitting the critic: a few epochs of minibatches on the value targets."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import PPOLoss


def fit_critic(
    loss: PPOLoss, optimizer: torch.optim.Optimizer, data: TensorDictBase, *, epochs: int, minibatch_size: int
) -> dict[str, float]:
    """Regresses the critic on the value targets of a batch.

    Rows that a loss mask excludes, and rows with anything that is not finite, are left out: one NaN would make every
    parameter of the critic NaN, for good.

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
    keys = loss.tensor_keys
    masks = {name: mask for name in loss._loss_mask_keys() if (mask := data.get(name, None)) is not None}
    names = [*loss.critic_network.in_keys, keys.value_target, keys.value]
    rows = TensorDict({**{name: data.get(name) for name in names}, **masks}, batch_size=data.batch_size).reshape(-1)
    counted = torch.ones(len(rows), dtype=torch.bool, device=rows.get(keys.value_target).device)
    for name in masks:
        counted &= rows.get(name).flatten(1).any(1) if rows.get(name).ndim > 1 else rows.get(name)
    finite = counted.clone()
    for name in names:
        finite &= rows.get(name).flatten(1).isfinite().all(1)
    dropped = int((counted & ~finite).sum())
    rows = rows[finite]
    if len(rows) == 0:
        return {"loss_critic": math.nan, "explained_variance": math.nan, "dropped": dropped}
    target, value = rows.get(keys.value_target), rows.get(keys.value)
    unexplained = (target - value).var() / target.var()
    total = target.new_zeros(())
    steps = 0
    for epoch in range(epochs):
        for drawn in torch.randperm(len(rows), device=target.device).split(minibatch_size):
            batch = rows[drawn]
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
