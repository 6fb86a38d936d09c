"""What modules are besides their tensors, by which compiled code tells whether it still stands for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictParams
from torch import Tensor, nn

_FEW = 64  # numbers of a tensor that are compared by value
_TENSORS = {"_parameters", "_buffers", "_modules"}


class _Same:
    """An object that equals itself alone; it is kept alive, so that no other takes its place in memory."""

    def __init__(self, value: Any, version: int) -> None:
        self._value, self._version = value, version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value and self._version == other._version

    def __hash__(self) -> int:
        return hash((id(self._value), self._version))


def settings_of(modules: Iterable[tuple[str, nn.Module]]) -> tuple[Any, ...]:
    """The types of modules, and their attributes but for parameters, buffers and submodules.

    Args:
        modules: the modules by name, as of ``named_modules``.

    Returns:
        Something that is equal as long as they are the same. Numbers and words are compared by value, also in lists,
        tuples, mappings, arrays and dataclasses, other objects by identity, long tensors also by their versions.
    """
    found = []
    for name, module in modules:
        attributes: Any = () if isinstance(module, TensorDictParams) else vars(module).items()
        own = tuple((key, setting_of(value)) for key, value in attributes if key not in _TENSORS)
        found.append((name, type(module), own))
    return (torch.is_autocast_enabled("cpu"), *found)


def setting_of(value: Any) -> Any:
    """An attribute as :func:`settings_of` compares it."""
    if isinstance(value, (bool, int, float, str, type, torch.dtype, torch.device)) or value is None:
        return value
    if isinstance(value, Tensor):
        if value.numel() <= _FEW and value.device.type == "cpu":
            return (value.dtype, value.shape, *value.flatten().tolist())
        return _Same(value, value._version)
    if isinstance(value, np.ndarray):
        return (value.dtype, value.shape, value.tobytes())
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and hasattr(value, "__dict__")):
        return (type(value), setting_of(vars(value)))
    if isinstance(value, (list, tuple)):
        return (type(value), *map(setting_of, value))
    if isinstance(value, Mapping) and not hasattr(value, "batch_size"):
        return (type(value), *((key, setting_of(each)) for key, each in value.items()))
    return _Same(value, 0)
