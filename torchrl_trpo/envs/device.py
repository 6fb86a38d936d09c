"""The device that a name such as ``auto`` stands for."""

from __future__ import annotations

import torch

from torchrl_trpo.errors import SettingError, nearest
from torchrl_trpo.parallel.torchrun import is_job, local_rank


def resolve_device(name: str) -> torch.device:
    """Finds the device that a name stands for.

    Args:
        name: ``"auto"`` (the accelerator that PyTorch has here, such as a GPU, else the CPU), ``"cpu"``, or an
            accelerator, such as ``"cuda"`` or ``"cuda:1"``. In a job of torchrun, ``"auto"`` and ``"cuda"`` are the one
            with the process's number on its machine.

    Returns:
        The device.

    Raises:
        SettingError: if the name is unknown or the device is not there.
    """
    accelerator, count = torch.accelerator.current_accelerator(check_available=True), torch.accelerator.device_count()
    kinds = [] if accelerator is None else [accelerator.type]
    indexed = [f"{kind}:{index}" for kind in kinds for index in range(count)]
    legal = ["auto", "cpu", *kinds, *indexed]
    there = f"{count} of {accelerator.type}" if accelerator is not None else "none"
    if name == "auto":
        name = (*kinds, "cpu")[0]
    if name in kinds and is_job():
        name = f"{name}:{local_rank()}"
    if name not in legal:
        raise SettingError(f"device: {name!r} is not there, PyTorch sees {there} here. {nearest(name, legal)}")
    return torch.device(name)
