"""Attention that can be differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def differentiable_attention(*, twice: bool = False) -> Iterator[None]:
    """Makes PyTorch's attention differentiable for the block, in evaluation mode and under ``vmap`` too.

    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` have a fast path for inference. They take it under
    ``vmap`` too, which hides that parameters require a gradient. With ``twice``, second derivatives can be taken, which
    the fused attention kernels do not have.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
