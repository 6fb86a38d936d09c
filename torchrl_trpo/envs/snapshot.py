"""A snapshot of everything that Python objects hold, to be put back for some environments of a batch, or for all."""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
import types
from collections.abc import Container, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LEAVES: tuple[type, ...] = (int, float, complex, str, bytes, type, enum.Enum, range, slice)
_LEAVES += (types.NoneType, types.ModuleType, types.BuiltinFunctionType)
_LEAVES += (torch.device, torch.dtype, torch.Size, torch.Generator)
_CONTAINERS: dict[str, tuple[type, ...]] = {
    "tensor": (Tensor,),
    "array": (np.ndarray,),
    "dict": (dict,),
    "list": (list,),
    "tuple": (tuple, frozenset),
    "set": (set,),
    "function": (types.FunctionType, types.MethodType, functools.partial),
}

_KINDS: dict[type, str] = {}  # of the types met so far


class InexactError(Exception):
    """A change that cannot be taken back for some environments of a batch only, or a state that cannot be saved."""


class ObjectSnapshot:
    """What is reachable from some objects, as it was when the snapshot was taken.

    Attributes, lists, tuples, dicts, sets, bound methods, partial functions and closures are followed. A tensor whose
    first dimension has the size of the batch holds one row per environment; two places that held the same tensor
    before, and hold the same one after, share the merged one too.

    Args:
        roots: where to begin.
        batch_size: the number of environments.
        shared: the paths, from :func:`tensors_in`, of tensors that belong to all environments, though their first
            dimension happens to have that size.
    """

    def __init__(self, roots: Iterable[object], batch_size: int, shared: Container[str] = ()) -> None:
        self._roots = list(roots)
        self._batch_size = batch_size
        self._shared = shared
        self._saved: dict[int, tuple[Any, Any]] = {}  # by identity: the object, which stays alive, and what it held
        self._merged: dict[tuple[int, int], Any] = {}  # in one pass over everything
        self._kept: dict[int, tuple[Tensor, object]] = {}  # what earlier passes made, and which version it had
        self._held: list[tuple[str, Any, Any]] = []  # what the last pass saw: kind, value, what it held then
        pending: list[Any] = list(self._roots)
        while pending:
            value = pending.pop()
            kind = kind_of(type(value))
            if kind == "leaf" or id(value) in self._saved:
                continue
            if kind == "tensor":
                self._saved[id(value)] = (value, (value.clone(), _version(value)))
            elif kind == "array":
                self._saved[id(value)] = (value, value.copy())
            else:
                parts = parts_of(kind, value)
                self._saved[id(value)] = (value, parts)
                pending.extend(values_of(parts))

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Puts the old state back for some environments; again, with the same ones, after further changes.

        It ends with an :class:`InexactError` if something changed that is not one tensor row per environment: call
        :meth:`restore` then.

        Args:
            rows: which, bool ``[batch_size]``; the others keep what they hold now.
        """
        if self._held and all(_holds_still(kind, value, held) for kind, value, held in self._held):
            return  # nothing has changed since the last pass
        self._merged, self._held = {}, []
        for root in self._roots:
            try:
                self._merge(root, root, rows, (None, type(root).__name__))
            except RecursionError as error:
                raise InexactError(f"{type(root).__name__} is nested too deeply") from error

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the old state back for all environments, whatever changed."""
        for value, saved in self._saved.values():
            kind = kind_of(type(value))
            if kind == "tensor":
                clone, version = saved
                if _version(value) != version:
                    value.copy_(clone)
            elif kind == "array":
                value[...] = saved
            elif kind in {"object", "dict"}:
                held = vars(value) if kind == "object" else value
                held.clear()
                held.update(saved)
            elif kind == "list":
                value[:] = saved
            elif kind == "set":
                value.clear()
                value.update(saved)

    def _merge(self, old: Any, new: Any, rows: Tensor, place: Place) -> Any:
        """What belongs where ``old`` was and ``new`` is; what containers hold is merged in them."""
        kind = kind_of(type(new))
        if kind == "leaf":
            if old is not new and (type(old) is not type(new) or old != new):
                raise InexactError(f"{path_of(place)} changed from {old!r} to {new!r}")
            return new
        pair = (id(old), id(new))
        if pair in self._merged:
            return self._merged[pair]
        if kind_of(type(old)) != kind:
            raise InexactError(f"{path_of(place)} changed from {type(old).__name__} to {type(new).__name__}")
        if old is not new and id(new) in self._saved:
            raise InexactError(f"{path_of(place)} became what was another {type(new).__name__} before")
        self._merged[pair] = new
        if kind == "tensor":
            self._merged[pair] = merged = self._merge_tensor(old, new, rows, place)
            self._held.append((kind, merged, _version(merged)))
            return merged
        saved = self._saved[id(old)][1]
        if kind == "array":
            if new.shape != saved.shape or not np.array_equal(new, saved, equal_nan=new.dtype.kind in "fc"):
                raise InexactError(f"{path_of(place)}, a NumPy array, changed")
            self._held.append((kind, new, None))
            return new
        parts = parts_of(kind, new)
        if kind == "set":
            if parts != saved:
                raise InexactError(f"{path_of(place)}, a set, changed")
            saved = parts = list(parts)
        keys = list(parts) if isinstance(parts, dict) else range(len(parts))
        if keys != (list(saved) if isinstance(saved, dict) else range(len(saved))):
            raise InexactError(f"{path_of(place)} changed its entries")
        for position, key in enumerate(keys):
            before, part = saved[key], parts[key]
            if before is part and kind_of(type(part)) == "leaf":
                continue
            merged = self._merge(before, part, rows, (place, key if isinstance(key, str) else position))
            if merged is part:
                continue
            if kind == "object":
                vars(new)[key] = merged
            elif kind in {"dict", "list"}:
                new[key] = merged
            else:
                raise InexactError(f"{path_of((place, position))}, in a {type(new).__name__}, was replaced")
        self._held.append((kind, new, _flat(parts_of(kind, new))))
        return new

    def _merge_tensor(self, old: Tensor, new: Tensor, rows: Tensor, place: Place) -> Tensor:
        clone, version = self._saved[id(old)][1]
        if new is old and _version(new) == version:
            return new
        if id(new) in self._kept and _version(new) == self._kept[id(new)][1]:
            return new
        if new.shape != clone.shape or new.dtype != clone.dtype:
            raise InexactError(
                f"{path_of(place)} changed from {clone.dtype} of shape {tuple(clone.shape)} to {new.dtype} of "
                f"{tuple(new.shape)}"
            )
        if new.ndim == 0 or new.shape[0] != self._batch_size or (self._shared and path_of(place) in self._shared):
            if not torch.equal(new, clone):
                raise InexactError(f"{path_of(place)}, of shape {tuple(new.shape)}, belongs to all environments")
            return new
        merged = torch.where(rows.reshape(-1, *[1] * (new.ndim - 1)), clone, new)
        if new is old:
            if any(size > 1 and stride == 0 for size, stride in zip(new.shape, new.stride(), strict=True)):
                raise InexactError(f"{path_of(place)} is expanded, and was written to")
            merged = new.copy_(merged)
        self._kept[id(merged)] = (merged, _version(merged))
        return merged


def tensors_in(roots: Iterable[object]) -> dict[str, Tensor]:
    """The tensors that are reachable from some objects.

    Args:
        roots: where to begin.

    Returns:
        The tensors by the path of their place; those that are nested too deeply to be reached are left out.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def walk(value: Any, place: Place) -> None:
        kind = kind_of(type(value))
        if kind == "tensor":
            found[path_of(place)] = value
        if kind in {"leaf", "array", "tensor"} or id(value) in seen:
            return
        seen.add(id(value))
        parts = parts_of(kind, value)
        keys = parts if isinstance(parts, dict) else range(len(parts))
        for position, (key, part) in enumerate(zip(keys, values_of(parts), strict=True)):
            walk(part, (place, key if isinstance(key, str) else position))

    for root in roots:
        with contextlib.suppress(RecursionError):
            walk(root, (None, type(root).__name__))
    return found


Place = tuple[Any, Any]
"""Where a value is: the place of what holds it, and its key there."""


def path_of(place: Place) -> str:
    """The names on the way to a place.

    Args:
        place: the place.

    Returns:
        The names, with dots between them.
    """
    names = []
    while place:
        place, key = place
        names.append(str(key))
    return ".".join(reversed(names))


def kind_of(cls: type) -> str:
    """How values of a type are copied, compared and written.

    Args:
        cls: the type.

    Returns:
        ``"tensor"``, ``"array"``, ``"dict"``, ``"list"``, ``"tuple"``, ``"set"``, ``"function"``, ``"object"``, or
        ``"leaf"`` for what is not looked into.
    """
    if cls not in _KINDS:
        kinds = [kind for kind, classes in _CONTAINERS.items() if issubclass(cls, classes)]
        kinds += ["object"] if getattr(cls, "__dictoffset__", False) else []
        _KINDS[cls] = kinds[0] if kinds and not issubclass(cls, _LEAVES) else "leaf"
    return _KINDS[cls]


def parts_of(kind: str, value: Any) -> Any:
    """What a value holds, in a container of its own.

    Args:
        kind: the kind of its type.
        value: the value, not a leaf.

    Returns:
        A dict for objects and dicts, a list, tuple or set for others.
    """
    if kind == "object":
        return dict(vars(value))
    if kind != "function":
        return value.copy() if kind in {"dict", "list", "set"} else tuple(value)
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    return (value.__code__, *cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())


def _holds_still(kind: str, value: Any, held: Any) -> bool:
    """Whether a tensor has the version that it had, or a container the very parts; of an array nothing tells."""
    if kind == "tensor":
        return _version(value) == held
    if kind == "array":
        return False
    parts = _flat(vars(value) if kind == "object" else parts_of(kind, value))
    return len(parts) == len(held) and all(map(operator.is_, parts, held))


def _flat(parts: Any) -> list:
    """The parts themselves, kept alive so that nothing new can take their identity, with their keys."""
    return [*parts, *values_of(parts)]


def values_of(parts: Any) -> Iterable[Any]:
    """The values among the parts.

    Args:
        parts: from :func:`parts_of`.

    Returns:
        The values of a dict, what others hold.
    """
    return parts.values() if isinstance(parts, dict) else parts


def _version(tensor: Tensor) -> object:
    """How often a tensor was written to; unknown, and so never the same, for those made in inference mode."""
    return object() if tensor.is_inference() else tensor._version
