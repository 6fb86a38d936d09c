"""Attention that can be differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def differentiable_attention(*, twice: bool = False) -> Iterator[None]:
    """A context in which PyTorch's attention can be differentiated, in evaluation mode and under ``vmap`` too.

    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` have a fast path for inference. They take it under
    ``vmap`` too, which hides that parameters require a gradient.

    Args:
        twice: whether second derivatives are taken, which the fused attention kernels do not have.

    Yields:
        Nothing.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
