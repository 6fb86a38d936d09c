"""The global random generators: seeding them, and restoring them afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl._utils import logger
from torchrl.checkpoint import GlobalRNGState


def rank_seed(seed: int, rank: int, start: int = 0) -> int:
    """A seed for each process of a job, from 0 to 2³² - 1.

    ``start`` is 0 at the job's start, and another number each time that the job draws new seeds. Rank 0 starts with the
    job's seed; the other seeds do not collide with those of other jobs.
    """
    return seed if rank == start == 0 else int(np.random.SeedSequence((seed, rank, start)).generate_state(1)[0])


def seed_generators(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - simulators may use the global one
    torch.manual_seed(seed)


class GlobalGenerators(GlobalRNGState):
    """TorchRL's ``GlobalRNGState``, extended from CUDA, XPU and MPS to any kind of accelerator."""

    def state_dict(self) -> dict[str, Any]:
        """The states of Python's, NumPy's and PyTorch's generators, also those of the devices in use."""
        state = super().state_dict()
        if (device := _unknown_to_torchrl()) is not None and torch.get_device_module(device).is_initialized():
            indices = range(torch.accelerator.device_count())
            state[_entry(device)] = [device_state(torch.device(device.type, index)) for index in indices]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the states; those of devices that this machine does not have are left out, with a warning."""
        kept = dict(state_dict)
        for entry in [entry for entry in kept if entry.startswith("torch_") and entry != "torch_cpu"]:
            kind, states = entry.removeprefix("torch_"), kept[entry]
            if (1 if isinstance(states, Tensor) else len(states)) > _device_count(kind):
                del kept[entry]
                logger.warning(
                    f"The checkpoint is of a machine with more devices of the kind {kind}: their random numbers are "
                    "not continued, and a resumed run is not the same to the bit."
                )
        super().load_state_dict(kept)
        if (device := _unknown_to_torchrl()) is not None:
            for index, state in enumerate(kept.get(_entry(device), ())):
                set_device_state(torch.device(device.type, index), state)


def _unknown_to_torchrl() -> torch.device | None:
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None or device.type in {"cuda", "xpu", "mps"} else device


def _device_count(kind: str) -> int:
    try:
        return torch.get_device_module(kind).device_count()
    except RuntimeError:  # this PyTorch does not have such devices
        return 0


def _entry(device: torch.device) -> str:
    return f"torch_{device.type}"


def device_state(device: torch.device) -> Tensor:
    """The state of a device's global generator, uint8 ``[bytes]`` on the CPU."""
    return _module(device).get_rng_state(*_index(device))


def set_device_state(device: torch.device, state: Tensor) -> None:
    """Sets a device's global generator to a :func:`device_state` of the same kind of device."""
    _module(device).set_rng_state(state.cpu(), *_index(device))


def _module(device: torch.device) -> Any:
    """The module with the functions of a device's global generator."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type in {"cpu", "mps"} else (device,)  # there is only one of these


def forked_generators(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Restores PyTorch's global generators of the CPU and of a device on leaving."""
    kind = {} if device.type == "cpu" else {"device_type": device.type}
    return torch.random.fork_rng([device] if kind else [], **kind)


@contextlib.contextmanager
def untouched_generators(seed: int | None = None) -> Iterator[None]:
    """Restores the global generators of Python, NumPy and PyTorch on leaving; ``seed`` seeds them inside."""
    generators = GlobalGenerators()
    before = generators.state_dict()
    try:
        if seed is not None:
            seed_generators(seed)
        yield
    finally:
        generators.load_state_dict(before)
        device = torch.accelerator.current_accelerator(check_available=True)
        if device is not None and _entry(device) not in before:
            # It was initialised inside, with the last seed there, which may be a simulator's.
            module = torch.get_device_module(device)
            getattr(module, "manual_seed_all", module.manual_seed)(torch.initial_seed())
