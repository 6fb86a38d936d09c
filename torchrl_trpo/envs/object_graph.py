"""A walk over everything that Python objects hold: the kinds of objects, their parts, and where each one is."""

from __future__ import annotations

import enum
import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_trpo.kernels.settings import held_by

_LEAVES: tuple[type, ...] = (int, float, complex, str, bytes, type, enum.Enum, range, slice)
_LEAVES += (types.NoneType, types.ModuleType, types.BuiltinFunctionType)
_LEAVES += (torch.device, torch.dtype, torch.Size, torch.Generator)
_CONTAINERS: dict[str, tuple[type, ...]] = {
    "tensor": (Tensor,),
    "array": (np.ndarray,),
    "dict": (dict,),
    "list": (list, deque),
    "tuple": (tuple, frozenset),
    "set": (set,),
    "function": (types.FunctionType, types.MethodType, functools.partial),
}
_KINDS: dict[type, str] = {}  # a cache of kind_of
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.BitGenerator, np.random.RandomState)

Place = tuple[Any, Any]
"""Where a value is: the place of the object that holds it, and its name there. A root has ``(None, name)``."""


class InexactError(Exception):
    """A change that cannot be undone for some environments of a batch only, or a state that cannot be saved."""


def kind_of(cls: type) -> str:
    """Sorts types by how their values are copied, compared and written.

    The kind is one of ``_CONTAINERS``, ``"object"`` (its parts are its attributes), or ``"leaf"`` for a value without
    parts.
    """
    if cls not in _KINDS:
        kinds = [kind for kind, classes in _CONTAINERS.items() if issubclass(cls, classes)]
        kinds += ["object"] if getattr(cls, "__dictoffset__", False) else []
        _KINDS[cls] = kinds[0] if kinds and not issubclass(cls, _LEAVES) else "leaf"
    return _KINDS[cls]


@functools.cache
def _slots_of(cls: Any) -> tuple[str, ...]:
    names = [vars(each).get("__slots__", ()) for each in cls.__mro__]
    return tuple(name for own in names for name in ([own] if isinstance(own, str) else own))


def hides_tensors(value: Any) -> bool:
    """Whether an object has tensors in ``__slots__``, where changes are not seen."""
    cls: Any = type(value)
    held = [(name, getattr(value, name, None)) for name in _slots_of(cls)]
    return any(isinstance(part, Tensor) for part, *_ in walk(held))


def changes_unseen(value: Any) -> bool:
    """Whether an object may change where no walk over its parts sees it.

    It does if it is an iterator or draws random numbers, or has ``__slots__`` and is compared by identity or by what
    may change. So does a built-in method of such an object.
    """
    if isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):
        value = value.__self__
    cls: Any = type(value)
    if isinstance(value, _GENERATORS) or (kind_of(cls) == "leaf" and hasattr(cls, "__next__")):
        return True
    is_fixed = cls.__hash__ not in (None, object.__hash__)
    return not is_fixed and bool({*_slots_of(cls)} - {"__dict__", "__weakref__"}) and not isinstance(value, type)


def parts_of(value: Any) -> Any:
    """What a value holds, in a container of its own; the parts themselves are not copied.

    It is a dict for objects and dicts, a list, tuple or set for others; empty for tensors, arrays and leaves.
    """
    kind = kind_of(type(value))
    if kind in {"leaf", "tensor", "array"}:
        return ()
    if kind == "object":
        return dict(vars(value))
    if kind != "function":
        return value.copy() if kind in {"dict", "list", "set"} or isinstance(value, frozenset) else tuple(value)
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values(), *value.keywords)
    return (value.__code__, *held_by(value))


def named(parts: Any) -> Iterator[tuple[str | int, Any]]:
    """Yields the parts in a container with their names: the key if it is a string, else the position.

    Those of a set come in the order of their types and values: its own order depends on how it was filled.
    """
    if isinstance(parts, set | frozenset):
        parts = sorted(parts, key=_description)
    items = parts.items() if isinstance(parts, dict) else enumerate(parts)
    for position, (key, part) in enumerate(items):
        yield (key if isinstance(key, str) else position), part


def _description(value: Any) -> str:
    cls = value if isinstance(value, type) else type(value)
    return f"{cls.__qualname__} {value if kind_of(cls) == 'leaf' and cls is not value else ''}"


def walk(
    roots: Iterable[tuple[str, Any]],
    named_parts: Callable[[Any], Iterable[tuple[str | int, Any]]] = lambda value: named(parts_of(value)),
    *,
    breadth_first: bool = False,
) -> Iterator[tuple[Any, Place, bool]]:
    """Yields everything that objects hold: each value, its place, and whether it is met for the first time.

    A value is yielded at each of its places, and its parts are followed once. With ``breadth_first``, an object is
    first met by the shortest way to it.
    """
    seen: dict[int, Any] = {}  # by identity, with the value, so that nothing else can take its identity
    pending: deque[tuple[Any, Place]] = deque((root, (None, name)) for name, root in roots)
    while pending:
        value, place = pending.popleft()
        first = id(value) not in seen
        yield value, place, first
        if first:
            seen[id(value)] = value
            parts = [(part, (place, name)) for name, part in named_parts(value)]
            if breadth_first:
                pending.extend(parts)
            else:
                pending.extendleft(reversed(parts))


def tensors_in(roots: Iterable[Any]) -> dict[str, Tensor]:
    """The tensors that objects hold, by their paths; a tensor at several places is there several times."""
    named_roots = [(type(root).__name__, root) for root in roots]
    return {path_of(place): value for value, place, _ in walk(named_roots) if isinstance(value, Tensor)}


def path_of(place: Place) -> str:
    """The names on the way to a place, with dots between them."""
    names = []
    while place:
        place, name = place
        names.append(str(name))
    return ".".join(reversed(names))
