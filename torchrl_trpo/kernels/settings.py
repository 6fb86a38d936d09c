"""What modules are besides their tensors, by which compiled code tells whether it still stands for them."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictParams
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_FEW = 1024  # numbers of a tensor that are compared by value
_DEEPEST = 2  # of the objects in objects whose attributes are compared
_LIBRARIES = ("torch.", "tensordict.", "torchrl.", "logging")  # their objects are compared by identity
_ATOMS = {type(None), bool, int, float, str, torch.dtype, torch.device}
_CONTAINERS = {dict, OrderedDict, list, tuple, set}
_TENSORS = {"_parameters", "_buffers", "_modules"}


class _Same:
    """An object that equals itself alone; it is kept alive, so that no other takes its place in memory."""

    def __init__(self, value: Any, version: int) -> None:
        self._value, self._version = value, version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value and self._version == other._version

    def __hash__(self) -> int:
        return hash((id(self._value), self._version))


_fixed = WeakTensorKeyDictionary()


def fixed(tensor: Tensor) -> Tensor:
    """Takes note that nothing writes to a tensor, and that it is made of settings alone. Returns the tensor."""
    _fixed[tensor] = True
    return tensor


def is_fixed(tensor: Tensor) -> bool:
    """Whether it has been said of a tensor that it is :func:`fixed`."""
    return tensor in _fixed


def settings_of(modules: Iterable[tuple[str, nn.Module]]) -> tuple[Any, ...]:
    """The types of modules, and their attributes but for parameters, buffers and submodules.

    Args:
        modules: the modules by name, as of ``named_modules``.

    Returns:
        Something that is equal as long as they are the same. Numbers, words and tensors of few numbers are compared by
        value, also in lists, tuples, mappings, sets, arrays and dataclasses; so are those that plain objects and
        functions hold, but for tensors. Other objects are compared by identity, long tensors also by their versions.
    """
    found = [(name, type(module), *_attributes(module, setting_of)) for name, module in modules]
    return (torch.is_autocast_enabled("cpu"), *found)


def constants_of(modules: Iterable[tuple[str, nn.Module]]) -> list[Tensor]:
    """The tensors whose values :func:`settings_of` compares; the arguments are the same."""
    return [tensor for _, module in modules for _, value in _attributes(module, _tensors_in) for tensor in value]


def _attributes(module: nn.Module, function: Callable[[Any], Any]) -> list[tuple[str, Any]]:
    """What a function gives of the attributes of a module, by their names."""
    attributes: Any = () if isinstance(module, TensorDictParams) else vars(module).items()
    return [(key, function(value)) for key, value in attributes if key not in _TENSORS]


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if _is_short(value) else []
    parts = _parts_of(value)
    parts = parts.values() if isinstance(parts, Mapping) else parts or ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _is_short(tensor: Tensor) -> bool:
    is_plain = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_complex()
    return is_plain and tensor.numel() <= _FEW and not tensor.requires_grad


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object with attributes that belongs to the user alone."""
    others = (type, Tensor, FunctionType, ModuleType, nn.Module)
    has_attributes = hasattr(value, "__dict__") and not isinstance(value, others)
    return has_attributes and not type(value).__module__.startswith(_LIBRARIES)


def held_by(function: FunctionType) -> list[Any]:
    """What a function holds in its closure and as defaults."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if not is_empty(cell)]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def is_empty(cell: CellType) -> bool:
    """Whether a closure's variable has no value yet."""
    return cell == CellType()


def _parts_of(value: Any) -> Any:
    """The parts of what is no more than its parts; None of other values."""
    if isinstance(value, (list, tuple, dict)):
        return value
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and hasattr(value, "__dict__")):
        return vars(value)
    return value if isinstance(value, Mapping) and not hasattr(value, "batch_size") else None


def setting_of(value: Any, depth: int = 0) -> Any:
    """An attribute as :func:`settings_of` compares it; ``depth`` is how many objects it is in, besides its module."""
    kind = type(value)
    if kind in _ATOMS or isinstance(value, (int, float, str, type)):
        return value
    if kind in _CONTAINERS and not value:  # most of a module's: it has a dozen dicts for hooks
        return kind
    if isinstance(value, Tensor):
        if depth:  # compiled code does not have its numbers
            return (value.dtype, value.shape)
        if _is_short(value):
            return (value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return _Same(value, value._version)
    if isinstance(value, np.ndarray):
        return (value.dtype, value.shape, value.tobytes())
    parts = _parts_of(value)
    if parts is not None and not parts:
        return type(value)
    if isinstance(parts, Mapping):
        return (type(value), *((key, setting_of(each, depth)) for key, each in parts.items()))
    if parts is not None:
        return (type(value), *(setting_of(each, depth) for each in parts))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(setting_of(each, depth) for each in value))
    inside: Any = ()
    if depth < _DEEPEST and isinstance(value, FunctionType):
        inside = held_by(value)
    elif depth < _DEEPEST and isinstance(value, MethodType):
        inside = [value.__func__, value.__self__]
    elif depth < _DEEPEST and is_plain_object(value):
        inside = vars(value)
    return (_Same(value, 0), setting_of(inside, depth + 1))
