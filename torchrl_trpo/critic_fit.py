"""Fitting the critic: a few epochs of minibatches on the value targets."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import PPOLoss


def fit_critic(
    loss: PPOLoss, optimizer: torch.optim.Optimizer, data: TensorDictBase, *, epochs: int, minibatch_size: int
) -> dict[str, float]:
    """Regresses the critic on the value targets of a batch.

    Args:
        loss: the loss whose critic is fitted; its ``loss_critic`` gives the distance.
        optimizer: over the critic's parameters.
        data: the batch with value targets, ``[*B, T]``; not modified.

    Keyword Args:
        epochs: the number of passes over the batch.
        minibatch_size: rows (environment steps) per gradient step.

    Returns:
        ``loss_critic``, the mean over the last epoch, and ``explained_variance`` of the targets by the values that the
        advantages were computed with.
    """
    keys = loss.tensor_keys
    target, value = data.get(keys.value_target), data.get(keys.value)
    unexplained = (target - value).var() / target.var()
    names = [*loss.critic_network.in_keys, keys.value_target, keys.value]
    rows = TensorDict({name: data.get(name) for name in names}, batch_size=data.batch_size).reshape(-1)
    total = target.new_zeros(())
    steps = 0
    for epoch in range(epochs):
        for drawn in torch.randperm(rows.numel(), device=target.device).split(minibatch_size):
            loss_critic = loss.loss_critic(rows[drawn])[0].mean()
            optimizer.zero_grad()
            loss_critic.backward()
            optimizer.step()
            if epoch == epochs - 1:
                total += loss_critic.detach()
                steps += 1
    return {"loss_critic": float(total / max(steps, 1)), "explained_variance": float(1 - unexplained)}
