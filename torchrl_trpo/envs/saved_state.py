"""The state of Python objects as plain data, to be put into the objects that the same program builds in a new process.

A program that builds its objects twice in the same way has the same objects in the same places then, though not with
the same content. So of an object that was there at the beginning its place is saved and its content, which the object
in that place of the new process takes over: no classes and no code are saved.
"""

from __future__ import annotations

import enum
import functools
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_trpo.envs.snapshot import InexactError, Place, kind_of, parts_of, path_of, values_of
from torchrl_trpo.errors import SettingError

_PLAIN = {types.NoneType, bool, int, float, str}
_VALUES: dict[type, tuple[str, Callable[[Any], Iterable], Callable]] = {
    complex: ("complex", lambda value: (value.real, value.imag), complex),
    bytes: ("bytes", list, lambda *parts: bytes(parts)),
    range: ("range", lambda value: (value.start, value.stop, value.step), range),
    slice: ("slice", lambda value: (value.start, value.stop, value.step), slice),
    torch.Size: ("size", list, lambda *parts: torch.Size(parts)),
    torch.dtype: ("dtype", lambda value: [str(value)], lambda name: getattr(torch, name.removeprefix("torch."))),
}
_FROM_PARTS: dict[str, Callable] = {
    **{name: from_parts for name, _, from_parts in _VALUES.values()},
    "enum": lambda cls, name: cls[name],
    "scalar": lambda dtype, value: np.dtype(dtype).type(value),
}
_STATEFUL: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (torch.Generator.get_state, lambda value, state: value.set_state(state.cpu())),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda value: value.bit_generator.state,
        lambda value, state: setattr(value.bit_generator, "state", state),
    ),
    deque: (list, lambda value, items: (value.clear(), value.extend(items))),
}
_CONSTANTS = (type, types.ModuleType, types.BuiltinFunctionType)
_NEW: dict[str, type] = {cls.__name__: cls for cls in (list, dict, OrderedDict, set, tuple, frozenset)}
_DATA = {"tensor", "array", "dict", "list", "set"}
_FIXED = {"object", "closure", "stateful"}


class ObjectState:
    """The state of everything that is reachable from some objects: saved here, and loaded into their counterparts.

    It is made when the objects have just been built. What was there then keeps its identity, tensors and arrays also
    their memory: a closure that holds one sees the loaded values. What has come since is made anew: numbers, tensors,
    arrays, lists, tuples, dicts, sets, and plain objects of a class that was known at the beginning. Places with the
    same object have the same one afterwards too, and tensors that share their memory share it.

    Generators of random numbers are included, but not the global ones, nor other global variables, nor attributes of
    classes. Whatever cannot be saved exactly is refused, with an error that says where it is.

    Args:
        roots: where to begin, by name. An object is told apart by the shortest way to it, so that what others refer to
            at random, such as the goal among the landmarks, should be a root itself.
        device: where the objects' tensors live. A state may be loaded on another one than it was saved on: tensors
            that were on the old one come to the new one.
    """

    def __init__(self, roots: Mapping[str, object], device: torch.device) -> None:
        self._roots = dict(roots)
        self._device = device
        self._objects: dict[str, Any] = {}  # by the way to them; classes, modules and built-in functions by their name
        self._signatures: dict[str, str] = {}  # what has to be the same for two objects to be counterparts
        seen: dict[int, Any] = {}  # by identity, with the value, which stays alive
        pending: deque[tuple[Any, Place]] = deque((root, (None, name)) for name, root in self._roots.items())
        while pending:
            value, place = pending.popleft()
            if type(value) in _PLAIN or id(value) in seen:
                continue
            seen[id(value)] = value
            kind = _kind(value)
            name = _signature(value) if kind == "constant" else path_of(place)
            if kind in {"constant", *_FIXED, *_DATA} and name not in self._objects:
                self._objects[name] = value
                if kind != "constant":
                    self._signatures[name] = f"{kind} {_signature(value)}"
            pending.extend((part, (place, key)) for key, part in _reachable(kind, value))

    @torch.no_grad()
    def save(self, *values: object) -> dict[str, Any]:
        """The state now, which later changes do not reach.

        It ends with an :class:`~torchrl_trpo.envs.snapshot.InexactError` if something cannot be saved.

        Args:
            *values: what else to save, that the objects do not hold themselves.

        Returns:
            Dicts with strings as keys, and lists, of tensors, numbers, strings, booleans and None: what ``torch.load``
            reads with ``weights_only=True``.
        """
        writer = _Writer(self._objects, self._device)
        for name, root in self._roots.items():
            writer.refer(root, (None, name))
        references = [writer.refer(value, (None, f"value {position}")) for position, value in enumerate(values)]
        writer.write()
        return {
            "objects": dict(self._signatures),
            "nodes": writer.nodes,
            "storages": writer.storages,
            "values": references,
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> list[Any]:
        """Puts a saved state into the objects.

        It ends with a :class:`~torchrl_trpo.errors.SettingError`, and nothing has changed then, if the state is of
        objects that were built differently.

        Args:
            state: from :meth:`save`, of these objects or of their counterparts.

        Returns:
            The values that were saved with it.
        """
        ours, theirs = self._signatures, state["objects"]
        for name in [*ours, *theirs]:
            now, then = ours.get(name), theirs.get(name)
            # A reset draws who shares a tensor with whom, and so where it is first met.
            if now != then and (None not in {now, then} or (now or then).split()[0] in _FIXED):
                raise _misfit(f"{name} is {now or 'missing'} here, and {then or 'missing'} there")
        reader = _Reader(state, self._objects, self._device)
        reader.fill()
        return [reader.value(reference) for reference in state["values"]]


class _Writer:
    """Plain values are written as they are, small ones as ``{type: parts}``, others as ``[the position of a node]``.

    A node is ``[kind, name of an object that was there, or None, class of a new one, content, attributes]``.
    """

    def __init__(self, objects: Mapping[str, Any], device: torch.device) -> None:
        self.nodes: list[Any] = []
        self.storages: list[Tensor] = []  # uint8, [bytes]
        self._device = device
        self._names = {id(value): name for name, value in objects.items()}
        self._positions: dict[int, tuple[int, Any]] = {}  # by identity, with the value, which stays alive
        self._positions_of_storages: dict[tuple[int, int], int] = {}
        self._pending: list[tuple[Any, Place]] = []

    def refer(self, value: Any, place: Place) -> Any:
        cls = type(value)
        if cls in _PLAIN:
            return value
        if cls in _VALUES:
            name, parts, _ = _VALUES[cls]
            return {name: self._list(parts(value), place)}
        if cls is torch.device:
            return {"device": [_device_name(value, self._device)]}
        if isinstance(value, enum.Enum) and value.name in cls.__members__:
            return {"enum": [self.refer(cls, (place, "__class__")), value.name]}
        if isinstance(value, np.generic) and type(value.item()) in _PLAIN:
            return {"scalar": [value.dtype.str, value.item()]}
        if id(value) not in self._positions:
            self._positions[id(value)] = (len(self.nodes), value)
            self.nodes.append(None)
            self._pending.append((value, place))
        return [self._positions[id(value)][0]]

    def write(self) -> None:
        while self._pending:
            value, place = self._pending.pop()
            self.nodes[self._positions[id(value)][0]] = self._node(value, place)

    def _node(self, value: Any, place: Place) -> list[Any]:
        kind = _kind(value)
        name = self._names.get(id(value))
        attributes = _attributes(kind, value)
        if kind == "opaque" or (attributes and kind not in {"dict", "list", "set", "closure"}):
            raise _refusal(value, place, "what it holds cannot be read")
        new = self._class(kind, value, place) if kind not in {"constant", "closure", "stateful"} else None
        if name is None and new is None:
            raise _refusal(value, place, "it, or its class, was not there at the beginning")
        return [kind, name, new, getattr(self, f"_{kind}")(value, place), self._dict(attributes, place)]

    def _class(self, kind: str, value: Any, place: Place) -> Any:
        """What is needed to make such a value anew; None if it cannot be."""
        cls = type(value)
        if cls in {Tensor, np.ndarray, types.MethodType, functools.partial}:
            return None if kind == "array" and value.base is not None else ""
        if _NEW.get(cls.__name__) is cls:
            return cls.__name__
        makeable = id(cls) in self._names and (kind == "object" or (kind == "tuple" and hasattr(cls, "_make")))
        return self.refer(cls, (place, "__class__")) if makeable else None

    def _constant(self, value: Any, place: Place) -> None:
        """Nothing; it is what it was."""

    def _object(self, value: Any, place: Place) -> list[Any]:
        return self._dict(vars(value), place)

    def _dict(self, value: Mapping, place: Place) -> list[Any]:
        items = enumerate(value.items())
        return [[self.refer(key, place), self.refer(part, (place, _name(key, at)))] for at, (key, part) in items]

    def _list(self, value: Iterable, place: Place) -> list[Any]:
        parts = _sorted(value) if isinstance(value, (set, frozenset)) else value
        return [self.refer(part, (place, at)) for at, part in enumerate(parts)]

    _set = _tuple = _list

    def _method(self, value: types.MethodType, place: Place) -> list[Any]:
        name = getattr(value.__func__, "__name__", "")
        of_class = getattr(type(value.__self__), name, None) is value.__func__
        return self._list((name if of_class else value.__func__, value.__self__), place)

    def _partial(self, value: functools.partial, place: Place) -> list[Any]:
        return [self._list((value.func, *value.args), place), self._dict(value.keywords, place)]

    def _closure(self, value: types.FunctionType, place: Place) -> list[Any]:
        cells = [[] if _is_empty(cell) else self._list([cell.cell_contents], place) for cell in value.__closure__ or ()]
        return [cells, self.refer(value.__defaults__, place), self.refer(value.__kwdefaults__, place)]

    def _stateful(self, value: Any, place: Place) -> Any:
        get, _ = _STATEFUL[type(value)]
        return self.refer(get(value), place)

    def _array(self, value: np.ndarray, place: Place) -> Any:
        try:
            return self.refer(torch.from_numpy(value.copy(order="K")), place)
        except TypeError as error:
            raise _refusal(value, place, f"its numbers are {value.dtype}") from error

    def _tensor(self, value: Tensor, place: Place) -> list[Any]:
        if value.layout != torch.strided or value.is_quantized or value.is_conj() or value.is_neg() or value.is_meta:
            raise _refusal(value, place, "its memory is not that of a simple tensor")
        if value.grad_fn is not None or value.grad is not None:
            raise _refusal(value, place, "it has a gradient, or a graph that leads to one")
        storage = value.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if key not in self._positions_of_storages:
            self._positions_of_storages[key] = len(self.storages)
            self.storages.append(torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage.clone()))
        device = _device_name(value.device, self._device)
        return [self._positions_of_storages[key], device, _layout(value), value.requires_grad]


class _Reader:
    """First what holds others is there, empty if it is new; then it is filled."""

    def __init__(self, state: Mapping[str, Any], objects: Mapping[str, Any], device: torch.device) -> None:
        self._nodes = state["nodes"]
        self._saved: list[Tensor] = state["storages"]
        self._device = device
        self._storages: dict[int, torch.UntypedStorage] = {}  # by position; at first, of the tensors that are there
        self._made: dict[int, Any] = {}  # by position; at first, what is there
        used: set[int] = set()
        for position, (kind, name, new, content, _) in enumerate(self._nodes):
            value = objects.get(name)
            if kind == "tensor" and value is not None:
                storage = value.untyped_storage()
                known = self._storages.get(content[0])
                free = known is None and storage.data_ptr() not in used and storage.nbytes() == self._n_bytes(content)
                fits = free or (known is not None and known.data_ptr() == storage.data_ptr())
                if not fits or _layout(value) != content[2]:
                    value = None
                elif free:
                    used.add(storage.data_ptr())
                    self._storages[content[0]] = storage
            if value is not None:
                self._made[position] = value
            elif new is None:
                raise _misfit(f"{name} is missing, or its memory is laid out otherwise")

    def _n_bytes(self, content: list[Any]) -> int:
        return self._saved[content[0]].numel()

    def fill(self) -> None:
        for position, storage in self._storages.items():
            storage.copy_(self._saved[position].untyped_storage())
        turns = {"object": 0, "stateful": 2}  # by what objects hold they may tell their hash, which sets and dicts need
        for position in sorted(range(len(self._nodes)), key=lambda position: turns.get(self._nodes[position][0], 1)):
            kind, _, _, content, attributes = self._nodes[position]
            value = self._make(position)
            self._fill(kind, value, content)
            if attributes or _attributes(kind, value):
                self._fill("object", value, attributes)

    def value(self, reference: Any) -> Any:
        if isinstance(reference, list):
            return self._make(*reference)
        if not isinstance(reference, dict):
            return reference
        ((name, parts),) = reference.items()
        if name == "device":
            return torch.device(parts[0] or self._device)
        return _FROM_PARTS[name](*self._values(parts))

    def _values(self, references: list[Any]) -> list[Any]:
        return [self.value(reference) for reference in references]

    def _items(self, references: list[Any]) -> Iterator[tuple[Any, Any]]:
        return ((self.value(key), self.value(part)) for key, part in references)

    def _make(self, position: int) -> Any:
        if position not in self._made:
            kind, _, new, content, _ = self._nodes[position]
            self._made[position] = self._new(kind, new, content)
        return self._made[position]

    def _new(self, kind: str, new: Any, content: Any) -> Any:
        if kind == "tensor":
            return self._tensor(*content)
        if kind == "array":
            return self.value(content).cpu().numpy().copy(order="K")
        if kind == "method":
            function, owner = self._values(content)
            return types.MethodType(getattr(type(owner), function) if isinstance(function, str) else function, owner)
        if kind == "partial":
            function, *arguments = self._values(content[0])
            return functools.partial(function, *arguments, **dict(self._items(content[1])))
        cls: Any = _NEW[new] if isinstance(new, str) else self.value(new)
        if kind == "tuple":
            return getattr(cls, "_make", cls)(self._values(content))
        return cls.__new__(cls)

    def _tensor(self, position: int, device: str | None, layout: list[Any], requires_grad: bool) -> Tensor:
        dtype, *geometry = layout
        if position not in self._storages:
            copy = self._saved[position].to(device or self._device, copy=True)
            self._storages[position] = copy.untyped_storage()
        storage = self._storages[position]
        tensor = torch.empty(0, dtype=getattr(torch, dtype), device=storage.device).set_(storage, *geometry)
        return tensor.requires_grad_(requires_grad)

    def _fill(self, kind: str, value: Any, content: Any) -> None:
        """Fills what is there already, or has just been made."""
        if kind == "object":
            vars(value).clear()
            vars(value).update(self._items(content))
        elif kind == "dict":
            value.clear()
            for key, part in self._items(content):
                value[key] = part
        elif kind == "list":
            value[:] = self._values(content)
        elif kind == "set":
            value.clear()
            value.update(self._values(content))
        elif kind == "closure":
            cells, defaults, keyword_defaults = content
            for cell, saved in zip(value.__closure__ or (), cells, strict=True):
                if saved:
                    (cell.cell_contents,) = self._values(saved)
            value.__defaults__, value.__kwdefaults__ = self.value(defaults), self.value(keyword_defaults)
        elif kind == "stateful":
            _, put = _STATEFUL[type(value)]
            put(value, self.value(content))
        elif kind == "array":
            value[...] = self.value(content).cpu().numpy()
        elif kind == "tensor" and value.requires_grad != content[-1]:
            value.requires_grad_(content[-1])


def _kind(value: Any) -> str:
    """How a value is saved; ``"opaque"`` if it cannot be."""
    cls = type(value)
    if isinstance(value, _CONSTANTS):
        bound = getattr(value, "__self__", None)
        return "constant" if bound is None or isinstance(bound, (type, types.ModuleType)) else "opaque"
    if cls in _STATEFUL:
        return "stateful"
    kind = kind_of(cls)
    if kind == "function":
        kinds = {types.FunctionType: "closure", types.MethodType: "method", functools.partial: "partial"}
        return kinds.get(cls, "opaque")
    special = kind == "tensor" and cls not in {Tensor, torch.nn.Parameter}
    special |= kind == "array" and cls is not np.ndarray
    return "opaque" if special or kind == "leaf" or (kind == "object" and _has_hidden_parts(cls)) else kind


def _has_hidden_parts(cls: type) -> bool:
    """Whether objects of a class hold more than their attributes, as those with slots, or written in C, may."""
    pointer = object.__basicsize__ // 2
    size = object.__basicsize__ + pointer * ((cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0))
    return cls.__basicsize__ > size or cls.__itemsize__ > 0


def _reachable(kind: str, value: Any) -> Iterator[tuple[Any, Any]]:
    """What a value holds and where, in an order that is the same in each process, and its class.

    Yields:
        The key or the position, and the part.
    """
    if kind == "constant":
        return
    if kind not in {"opaque", "stateful", "tensor", "array"}:
        parts = parts_of(kind_of(type(value)), value)
        parts = _sorted(parts) if isinstance(parts, (set, frozenset)) else parts
        keys = list(parts) if isinstance(parts, dict) else range(len(parts))
        for position, (key, part) in enumerate(zip(keys, values_of(parts), strict=True)):
            yield _name(key, position), part
        yield from ((f"key {position}", key) for position, key in enumerate(keys) if kind == "dict")
        yield from _attributes(kind, value).items()
    yield "__class__", type(value)


def _attributes(kind: str, value: Any) -> dict[str, Any]:
    """What a value that is no plain object has for attributes."""
    return {} if kind in {"object", "constant", "opaque", "stateful"} else getattr(value, "__dict__", {})


def _signature(value: Any) -> str:
    """The name of a class, module or function; of another value that of its class, and its shape."""
    named = value if isinstance(value, (*_CONSTANTS, types.FunctionType)) else type(value)
    name = f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', named.__name__)}"
    return f"{name} {value.dtype} {list(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else name


def _sorted(values: Iterable) -> list[Any]:
    """What a set holds, as far as can be in an order that is the same in each process."""
    return sorted(values, key=lambda value: (_signature(value), repr(value) if type(value) in _PLAIN else ""))


def _layout(tensor: Tensor) -> list[Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [dtype, tensor.storage_offset(), list(tensor.shape), list(tensor.stride())]


def _device_name(device: torch.device, usual: torch.device) -> str | None:
    return None if device.type == usual.type else str(device)


def _is_empty(cell: types.CellType) -> bool:
    return cell == types.CellType()


def _name(key: Any, position: int) -> str | int:
    return key if isinstance(key, str) else position


def _refusal(value: object, place: Place, reason: str) -> InexactError:
    return InexactError(f"{path_of(place)}, a {type(value).__name__}, cannot be saved: {reason}")


def _misfit(reason: str) -> SettingError:
    return SettingError(f"The saved state does not fit; it is of other arguments or another version: {reason}.")
