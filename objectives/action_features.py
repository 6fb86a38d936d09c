"""Actions as inputs of a network: discrete ones one-hot."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchrl.data import Categorical, MultiCategorical, TensorSpec


def action_features(action: Tensor, spec: TensorSpec | None) -> Tensor:
    """What a network can read of an action.

    Args:
        action: the action, ``[*B]`` if categorical, else ``[*B, A]``.
        spec: the action's spec; without one, a categorical action enters as its index.

    Returns:
        Categorical and multi-categorical actions one-hot, others as they are, ``[*B, F]``.
    """
    if isinstance(spec, MultiCategorical):  # a subclass of Categorical
        return torch.cat(
            [functional.one_hot(a, n) for a, n in zip(action.unbind(-1), _sizes(spec), strict=True)], dim=-1
        )
    return functional.one_hot(action, spec.n) if isinstance(spec, Categorical) else action


def n_action_features(spec: TensorSpec) -> int:
    """The size of what :func:`action_features` returns.

    Args:
        spec: the action's spec.

    Returns:
        The size of the last dimension.
    """
    if isinstance(spec, MultiCategorical):
        return sum(_sizes(spec))
    return spec.n if isinstance(spec, Categorical) else spec.shape[-1]


def _sizes(spec: MultiCategorical) -> list[int]:
    """How many values each of a multi-categorical agent's actions has; all agents of a group have the same."""
    return spec.nvec.reshape(-1, spec.shape[-1])[0].tolist()
