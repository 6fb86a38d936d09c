"""A snapshot of everything that Python objects hold, to be put back for some environments of a batch, or for all."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_trpo.envs.object_graph import InexactError, Place, hides_tensors, kind_of, parts_of, path_of, walk


class ObjectSnapshot:
    """Everything that some objects hold, as it is when the snapshot is taken.

    It follows attributes, lists, tuples, dicts, sets, bound methods, partial functions and closures. A tensor whose
    first dimension has the size of the batch holds one row per environment, except those whose paths, as of
    :func:`~torchrl_trpo.envs.object_graph.tensors_in`, are in ``shared``. Two places that share a tensor before and
    after share the merged one too.

    Attributes:
        hidden: what holds tensors where they are not seen, so that a snapshot is not complete; empty if nothing does.
    """

    def __init__(self, roots: Iterable[object], batch_size: int, shared: Container[str] = ()) -> None:
        self._roots = list(roots)
        self._batch_size = batch_size
        self._shared = shared
        self._saved: dict[int, tuple[Any, Any]] = {}  # by identity: the object, which stays alive, and what it held
        self._merged: dict[tuple[int, int], Any] = {}  # by the identities of old and new, in one call of keep
        self._kept: dict[int, tuple[Tensor, object]] = {}  # tensors that earlier calls of keep wrote, and their version
        self._held: list[tuple[Any, Any]] = []  # what the last call of keep saw: an object and what it held then
        self.hidden = ""
        for value, place, first in walk((type(root).__name__, root) for root in self._roots):
            kind = kind_of(type(value))
            if first and kind in {"leaf", "object"} and hides_tensors(value):
                self.hidden = f"{path_of(place)}, a {type(value).__name__}, has tensors in __slots__"
            if not first or kind == "leaf":
                continue
            if kind == "tensor":
                self._saved[id(value)] = (value, (value.clone(), n_writes(value)))
            else:
                self._saved[id(value)] = (value, value.copy() if kind == "array" else parts_of(value))

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Puts the old state back for some environments, bool ``[batch_size]``; the others stay as they are now.

        It can be called again for the same environments after further changes. It raises InexactError if something
        changed that is not one tensor row per environment: call :meth:`restore` then.
        """
        if self._held and all(_is_unchanged(value, held) for value, held in self._held):
            return
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
                if n_writes(value) != version:
                    value.copy_(clone)
            elif kind == "array":
                value[...] = saved
            elif kind in {"object", "dict"}:
                held = vars(value) if kind == "object" else value
                held.clear()
                held.update(saved)
            elif kind == "list":
                value.clear()
                value.extend(saved)
            elif kind == "set":
                value.clear()
                value.update(saved)

    def _merge(self, old: Any, new: Any, rows: Tensor, place: Place) -> Any:
        """Merges what was at a place with what is there now, containers in place; returns what belongs there."""
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
            self._held.append((merged, n_writes(merged)))
            return merged
        saved = self._saved[id(old)][1]
        if kind == "array":
            if new.shape != saved.shape or not np.array_equal(new, saved, equal_nan=new.dtype.kind in "fc"):
                raise InexactError(f"{path_of(place)}, a NumPy array, changed")
            self._held.append((new, None))
            return new
        parts = parts_of(new)
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
        self._held.append((new, _flat(parts_of(new))))
        return new

    def _merge_tensor(self, old: Tensor, new: Tensor, rows: Tensor, place: Place) -> Tensor:
        clone, version = self._saved[id(old)][1]
        if new is old and n_writes(new) == version:
            return new
        if id(new) in self._kept and n_writes(new) == self._kept[id(new)][1]:
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
        self._kept[id(merged)] = (merged, n_writes(merged))
        return merged


def _is_unchanged(value: Any, held: Any) -> bool:
    """Whether a tensor has the same version, or a container the same parts; unknown for an array."""
    kind = kind_of(type(value))
    if kind == "tensor":
        return n_writes(value) == held
    if kind == "array":
        return False
    parts = _flat(parts_of(value))
    return len(parts) == len(held) and all(map(operator.is_, parts, held))


def _flat(parts: Any) -> list:
    """The parts with their keys; the list keeps them alive, so that nothing else can take their identity."""
    return [*parts, *(parts.values() if isinstance(parts, dict) else ())]


def n_writes(tensor: Tensor) -> object:
    """Counts the writes to a tensor. One made in inference mode has no count; its version equals no other."""
    return object() if tensor.is_inference() else tensor._version
