from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.benchmarks.comparison import hatrpo_pair, shared_pair


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("pair", [shared_pair, hatrpo_pair], ids=["shared", "hatrpo"])
def test_the_textbook_takes_the_same_step(pair):
    """Two implementations that share no code must agree to rounding, or the ratios compare different problems."""
    assert pair(rows=300).distance() < 1e-10
