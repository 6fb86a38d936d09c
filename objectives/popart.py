"""PopArt: critics that output normalised values, and whose values stay the same when the statistics move."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import ValueNorm

from torchrl_trpo.parallel.ranks import ALONE, Ranks


@torch.no_grad()
def update_value_norm(
    value_norm: ValueNorm, targets: Tensor, critic: TensorDictBase | None = None, ranks: Ranks = ALONE
) -> None:
    r"""Moves the statistics ``(1,)`` of normalised values, and corrects the critic so that no value changes.

    With :math:`\sigma, \mu` before and :math:`\sigma', \mu'` after, the last layer's weight becomes
    :math:`W \sigma / \sigma'` and its bias :math:`(\sigma b + \mu - \mu') / \sigma'` (van Hasselt et al. 2016,
    arXiv:1602.07714, equation 1). ``targets`` are the value targets that count, ``[*B, 1]``; ``critic`` holds the
    critic's parameters, None if it outputs raw values.
    """
    targets = ranks.concat(targets)
    if targets.numel() == 0:
        return
    targets = torch.where(targets.isfinite(), targets, _mean(value_norm))  # one NaN would stay in the statistics
    if critic is None:
        value_norm.update(targets)
        return
    scale, mean = value_norm.scale().clone(), _mean(value_norm).clone()
    value_norm.update(targets)
    weight, bias = _last_layer(critic)
    weight.mul_(scale / value_norm.scale())
    bias.mul_(scale).add_(mean - _mean(value_norm)).div_(value_norm.scale())


def check_values(before: Tensor, after: Tensor, value_norm: ValueNorm) -> None:
    """Raises ValueError if values differ by more than rounding before and after a correction."""
    tolerance = max(1e-3, 8 * torch.finfo(before.dtype).eps)
    if not torch.allclose(before, after, rtol=tolerance, atol=tolerance * float(value_norm.scale()), equal_nan=True):
        raise ValueError(
            "value_norm: the critic outputs normalised values, and its linear layer of one output was corrected for "
            f"new statistics, but its values changed by up to {float((after - before).abs().max()):.3g}: that layer is "
            "not what outputs them. Legal: a critic that ends with such a layer, or no value_norm in the value "
            "estimator."
        )


def _mean(value_norm: ValueNorm) -> Tensor:
    return value_norm.denormalize(torch.zeros_like(value_norm.scale()))


def _last_layer(critic: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Weight ``[..., 1, H]`` and bias ``[..., 1]`` of the layer that outputs the value."""
    # Not their .data: autograd must notice that a graph from before the correction can no longer be differentiated.
    parameters = {key if isinstance(key, tuple) else (key,): value for key, value in critic.items(True, True)}
    found = []
    for key, weight in parameters.items():
        bias = parameters.get((*key[:-1], "bias"))
        if key[-1] == "weight" and bias is not None and weight.shape[-2:-1] == (1,) and bias.shape == weight.shape[:-1]:
            found.append((weight, bias))
    if len(found) != 1:
        raise ValueError(
            "value_norm: the critic outputs normalised values, and its last layer is corrected when the statistics "
            f"move. Legal: a critic with one linear layer of one output, with a bias; this one has {len(found)}. Use a "
            "critic for each group, or leave value_norm out of the value estimator."
        )
    return found[0]
