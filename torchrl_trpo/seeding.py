"""Global random numbers: seeded for a while, and left as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torchrl.checkpoint import GlobalRNGState


def rank_seed(seed: int, rank: int, start: int = 0) -> int:
    """A seed for each process of a job, far from those of other jobs' processes; the first one's is the job's.

    Args:
        seed: the job's seed.
        rank: the process's number.
        start: where in the job the random numbers begin anew, 0 at its begin.

    Returns:
        The seed, from 0 to 2³² - 1.
    """
    return seed if rank == start == 0 else int(np.random.SeedSequence((seed, rank, start)).generate_state(1)[0])


def seed_generators(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and PyTorch.

    Args:
        seed: the seed.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - simulators may use the global one
    torch.manual_seed(seed)


@contextlib.contextmanager
def untouched_generators(seed: int | None = None) -> Iterator[None]:
    """Leaves the global generators of Python, NumPy and PyTorch as they were.

    Args:
        seed: where they begin inside; None for where they are.

    Yields:
        Nothing.
    """
    generators, uninitialized = GlobalRNGState(), not torch.cuda.is_initialized()
    before = generators.state_dict()
    try:
        if seed is not None:
            seed_generators(seed)
        yield
    finally:
        generators.load_state_dict(before)
        if uninitialized:  # CUDA takes the last seed when it is initialised, and simulators seed
            torch.cuda.manual_seed_all(torch.initial_seed())
