"""Several discrete actions at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributions as D
from torchrl.modules import MaskedCategorical


class MultiCategorical(D.Distribution):
    """Several independent discrete actions at once, for ``MultiDiscrete`` and ``MultiCategorical`` spaces.

    Args:
        logits: the logits of all actions, concatenated, ``[*B, Σ nvec]``.
        nvec: the number of values of each action.
        mask: which values are allowed, bool ``[*B, Σ nvec]``. Default: all.

    Examples:
        >>> import torch
        >>> from torchrl_trpo.distributions import MultiCategorical
        >>> dist = MultiCategorical(torch.zeros(5, 3 + 2), nvec=(3, 2))
        >>> dist.sample().shape, dist.log_prob(dist.sample()).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, logits: Tensor, nvec: Sequence[int], mask: Tensor | None = None) -> None:
        self.nvec = tuple(int(n) for n in nvec)
        if logits.shape[-1] != sum(self.nvec):
            raise ValueError(
                f"logits has shape {tuple(logits.shape)}, which does not fit nvec={self.nvec}. Legal: "
                f"{(*logits.shape[:-1], sum(self.nvec))}."
            )
        parts = logits.split(self.nvec, -1)
        if mask is None:
            self.categoricals = [D.Categorical(logits=part, validate_args=False) for part in parts]
        else:
            masks = mask.split(self.nvec, -1)
            self.categoricals = [MaskedCategorical(part, mask=m) for part, m in zip(parts, masks, strict=True)]
        super().__init__(logits.shape[:-1], torch.Size([len(self.nvec)]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws actions.

        Args:
            sample_shape: how many.

        Returns:
            The actions, int64 ``[*sample_shape, *B, len(nvec)]``.
        """
        return torch.stack([part.sample(torch.Size(sample_shape)) for part in self.categoricals], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """The logarithm of the joint probability.

        Args:
            value: the actions, ``[*B, len(nvec)]``.

        Returns:
            The logarithms, ``[*B]``.
        """
        return torch.stack([part.log_prob(v) for part, v in zip(self.categoricals, value.unbind(-1), strict=True)]).sum(
            0
        )

    def entropy(self) -> Tensor:
        """The entropy of the joint action in nats, ``[*B]``."""
        return torch.stack([part.entropy() for part in self.categoricals]).sum(0)

    @property
    def mode(self) -> Tensor:
        """The likeliest actions, ``[*B, len(nvec)]``."""
        return torch.stack([part.mode for part in self.categoricals], -1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The mode, the action of a deterministic policy."""
        return self.mode
