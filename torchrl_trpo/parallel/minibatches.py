"""Epochs of minibatches, drawn from the rows of one process or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchrl_trpo.parallel.ranks import Ranks

ADAM_RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number of at least 0", lambda v: 0 <= v < math.inf),
    "epochs": ("a whole number of at least 1", lambda v: isinstance(v, int) and v >= 1),
    "minibatch_size": ("a whole number of at least 1", lambda v: isinstance(v, int) and v >= 1),
    "max_grad_norm": ("a positive number", lambda v: v > 0),
}
"""The ranges of the settings of minibatch steps: in words, and as a check."""


def count_by_rank(kept: Tensor, ranks: Ranks) -> list[int]:
    """The number of rows of each rank, from the indices ``kept`` of this rank's rows."""
    return ranks.concat(kept.new_tensor([len(kept)])).tolist() if ranks.size > 1 else [len(kept)]


def draw_minibatches(kept: Tensor, kept_by_rank: Sequence[int], size: int, ranks: Ranks) -> Iterator[Tensor]:
    """Yields this rank's rows, out of the indices ``kept``, of each minibatch in one pass over the rows of all ranks.

    A minibatch has ``size`` rows of all ranks together, perhaps none of this one's. The first rank draws the order.
    """
    order = ranks.first_(torch.randperm(sum(kept_by_rank), device=kept.device))
    if ranks.size == 1:
        yield from kept[order].split(size)
        return
    position = order - sum(kept_by_rank[: ranks.rank])
    own = (position >= 0) & (position < len(kept))
    counts = [int(count) for count in torch.stack([part.sum() for part in own.split(size)]).tolist()]
    yield from kept[position[own]].split(counts)


def average_gradients(
    parameters: Sequence[Tensor], loss: Tensor, counted: Tensor, drawn: Tensor, ranks: Ranks
) -> Tensor:
    """Averages a loss and its gradients over the values of all ranks; the gradients in place.

    ``loss`` is the mean over those values of this rank's ``drawn`` rows that are ``counted``, without a graph. Each
    parameter is given once; one without a gradient counts as 0.
    """
    if ranks.size == 1:
        return loss
    count = counted[drawn].sum()
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    own = torch.cat([*(gradient.flatten() for gradient in gradients), loss.reshape(1)]) * count
    sizes = [*(gradient.numel() for gradient in gradients), 1]
    *means, whole = ranks.sum_(torch.cat([own, count.to(own.dtype).reshape(1)])).split([*sizes, 1])
    for gradient, mean in zip(gradients, means, strict=False):
        gradient.copy_((mean / whole).reshape(gradient.shape))
    return (means[-1] / whole).squeeze(0)
