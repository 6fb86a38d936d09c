"""Python objects as plain data, which ``torch.load`` reads with ``weights_only=True``: no classes and no code."""

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

from torchrl_trpo.envs.object_graph import InexactError, Place, kind_of, named, parts_of, path_of
from torchrl_trpo.errors import SettingError
from torchrl_trpo.kernels.settings import is_empty

PLAIN = {types.NoneType, bool, int, float, str}  # written as they are
CONSTANTS = (type, types.ModuleType, types.BuiltinFunctionType)  # known by name, and the same in each process
# Small immutable values: the name of the type, how to take a value apart, and how to make it of its parts.
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
# Objects whose content is read and written by functions of their own.
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
# Classes that are known by name in each process.
_NEW: dict[str, type] = {cls.__name__: cls for cls in (list, dict, OrderedDict, set, tuple, frozenset)}


class Writer:
    """Writes values as plain data.

    A plain value is written as it is, a small one as ``{type: parts}``, any other as ``[position of its node]``. A node
    is ``[kind, name, class, content, attributes]``: a known object, one of ``objects``, has a name; the class makes an
    object anew, and is None where that is impossible. Tensors on ``device`` may be loaded on another one.
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
        """Writes a reference to a value; :meth:`write` writes the nodes."""
        cls = type(value)
        if cls in PLAIN:
            return value
        if cls in _VALUES:
            name, parts, _ = _VALUES[cls]
            return {name: self._list(parts(value), place)}
        if cls is torch.device:
            return {"device": [_device_name(value, self._device)]}
        if isinstance(value, enum.Enum) and value.name in cls.__members__:
            return {"enum": [self.refer(cls, (place, "__class__")), value.name]}
        if isinstance(value, np.generic) and type(value.item()) in PLAIN:
            return {"scalar": [value.dtype.str, value.item()]}
        if id(value) not in self._positions:
            self._positions[id(value)] = (len(self.nodes), value)
            self.nodes.append(None)
            self._pending.append((value, place))
        return [self._positions[id(value)][0]]

    def write(self) -> None:
        """Writes the nodes of everything that was referred to, and of what it holds."""
        while self._pending:
            value, place = self._pending.pop()
            self.nodes[self._positions[id(value)][0]] = self._node(value, place)

    def _node(self, value: Any, place: Place) -> list[Any]:
        kind = saved_kind_of(value)
        name = self._names.get(id(value))
        attributes = attributes_of(kind, value)
        if kind == "opaque" or (attributes and kind not in {"dict", "list", "set", "closure"}):
            raise _refusal(value, place, "what it holds cannot be read")
        new = self._class(kind, value, place) if kind not in {"constant", "closure", "stateful"} else None
        if name is None and new is None:
            raise _refusal(value, place, "it, or its class, was not there at the beginning")
        return [kind, name, new, self._content(kind, value, place), self._items(attributes, place)]

    def _class(self, kind: str, value: Any, place: Place) -> Any:
        """The class that makes such a value anew; empty where the kind is enough, None where nothing can."""
        cls = type(value)
        if cls in {Tensor, np.ndarray, types.MethodType, functools.partial}:
            return None if kind == "array" and value.base is not None else ""
        if _NEW.get(cls.__name__) is cls:
            return cls.__name__
        makeable = id(cls) in self._names and (kind == "object" or (kind == "tuple" and hasattr(cls, "_make")))
        return self.refer(cls, (place, "__class__")) if makeable else None

    def _content(self, kind: str, value: Any, place: Place) -> Any:
        match kind:
            case "constant":
                return None
            case "object":
                return self._items(vars(value), place)
            case "dict":
                return self._items(value, place)
            case "list" | "tuple" | "set":
                return self._list(value, place)
            case "method":
                return self._method(value, place)
            case "partial":
                return [self._list((value.func, *value.args), place), self._items(value.keywords, place)]
            case "closure":
                return self._closure(value, place)
            case "stateful":
                get, _ = _STATEFUL[type(value)]
                return self.refer(get(value), place)
            case "array":
                return self._array(value, place)
            case "tensor":
                return self._tensor(value, place)
        raise AssertionError(kind)

    def _items(self, value: Mapping, place: Place) -> list[Any]:
        items = zip(named(value), value.keys(), strict=True)
        return [[self.refer(key, place), self.refer(part, (place, name))] for (name, part), key in items]

    def _list(self, value: Iterable, place: Place) -> list[Any]:
        parts = in_order(value) if isinstance(value, (set, frozenset)) else value
        return [self.refer(part, (place, position)) for position, part in enumerate(parts)]

    def _method(self, value: types.MethodType, place: Place) -> list[Any]:
        name = getattr(value.__func__, "__name__", "")
        of_class = getattr(type(value.__self__), name, None) is value.__func__
        return self._list((name if of_class else value.__func__, value.__self__), place)

    def _closure(self, value: types.FunctionType, place: Place) -> list[Any]:
        cells = [[] if is_empty(cell) else self._list([cell.cell_contents], place) for cell in value.__closure__ or ()]
        return [cells, self.refer(value.__defaults__, place), self.refer(value.__kwdefaults__, place)]

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


class Reader:
    """Reads plain data in two passes: it makes empty objects, then fills them, so that objects may hold each other.

    ``state`` has the nodes and storages that a :class:`Writer` wrote. The known ``objects`` keep their identity, and
    tensors and arrays their memory. Tensors that were on the writer's device go to ``device``. It raises SettingError
    if an object is missing that cannot be made anew; nothing has changed then.
    """

    def __init__(self, state: Mapping[str, Any], objects: Mapping[str, Any], device: torch.device) -> None:
        self._nodes = state["nodes"]
        self._saved: list[Tensor] = state["storages"]
        self._device = device
        self._storages: dict[int, torch.UntypedStorage] = {}  # by position, at first those of known tensors
        self._made: dict[int, Any] = {}  # by position, at first the known objects
        used: set[int] = set()
        for position, (kind, name, new, content, _) in enumerate(self._nodes):
            value = objects.get(name)
            if kind == "tensor" and value is not None:
                storage = value.untyped_storage()
                known = self._storages.get(content[0])
                n_bytes = self._saved[content[0]].numel()
                free = known is None and storage.data_ptr() not in used and storage.nbytes() == n_bytes
                fits = free or (known is not None and known.data_ptr() == storage.data_ptr())
                if not fits or _layout(value) != content[2]:
                    value = None
                elif free:
                    used.add(storage.data_ptr())
                    self._storages[content[0]] = storage
            if value is not None:
                self._made[position] = value
            elif new is None:
                raise misfit(f"{name} is missing, or its memory is laid out otherwise")

    def fill(self) -> None:
        """Fills all objects."""
        for position, storage in self._storages.items():
            storage.copy_(self._saved[position].untyped_storage())
        # Objects come first: sets and dicts need their hashes, which may read attributes.
        turns = {"object": 0, "stateful": 2}
        for position in sorted(range(len(self._nodes)), key=lambda position: turns.get(self._nodes[position][0], 1)):
            kind, _, _, content, attributes = self._nodes[position]
            value = self._make(position)
            self._fill(kind, value, content)
            if attributes or attributes_of(kind, value):
                self._fill("object", value, attributes)

    def value(self, reference: Any) -> Any:
        """Reads a reference."""
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
        """Makes a value; a container is empty, unless it is immutable."""
        match kind:
            case "tensor":
                return self._tensor(*content)
            case "array":
                return self.value(content).cpu().numpy().copy(order="K")
            case "method":
                function, owner = self._values(content)
                return types.MethodType(
                    getattr(type(owner), function) if isinstance(function, str) else function, owner
                )
            case "partial":
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
        match kind:
            case "object":
                vars(value).clear()
                vars(value).update(self._items(content))
            case "dict":
                value.clear()
                for key, part in self._items(content):
                    value[key] = part
            case "list":
                value[:] = self._values(content)
            case "set":
                value.clear()
                value.update(self._values(content))
            case "closure":
                cells, defaults, keyword_defaults = content
                for cell, saved in zip(value.__closure__ or (), cells, strict=True):
                    if saved:
                        (cell.cell_contents,) = self._values(saved)
                value.__defaults__, value.__kwdefaults__ = self.value(defaults), self.value(keyword_defaults)
            case "stateful":
                _, put = _STATEFUL[type(value)]
                put(value, self.value(content))
            case "array":
                value[...] = self.value(content).cpu().numpy()
            case "tensor" if value.requires_grad != content[-1]:
                value.requires_grad_(content[-1])


def saved_kind_of(value: Any) -> str:
    """Sorts values by how they are saved; ``"opaque"`` if they cannot be."""
    cls = type(value)
    if isinstance(value, CONSTANTS):
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
    """Whether objects of a class may hold more than their attributes, as those with slots or written in C do."""
    pointer = object.__basicsize__ // 2
    size = object.__basicsize__ + pointer * ((cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0))
    return cls.__basicsize__ > size or cls.__itemsize__ > 0


def parts_to_save(value: Any) -> Iterator[tuple[str | int, Any]]:
    """Yields the parts, keys, attributes and class of a value, with names, in the same order in each process.

    Plain values are left out.
    """
    kind = saved_kind_of(value)
    if kind == "constant" or type(value) in PLAIN:
        return
    found: list[tuple[str | int, Any]] = []
    if kind not in {"opaque", "stateful"}:
        parts = parts_of(value)
        found += named(in_order(parts) if isinstance(parts, (set, frozenset)) else parts)
        found += [(f"key {position}", key) for position, key in enumerate(parts) if kind == "dict"]
        found += attributes_of(kind, value).items()
    yield from ((name, part) for name, part in [*found, ("__class__", type(value))] if type(part) not in PLAIN)


def attributes_of(kind: str, value: Any) -> dict[str, Any]:
    """The attributes of a value that holds something else besides, such as a function or a subclass of dict."""
    return {} if kind in {"object", "constant", "opaque", "stateful"} else getattr(value, "__dict__", {})


def signature_of(value: Any) -> str:
    """The name of a class, module or function; the name of any other value's class, with the shape of a tensor."""
    source = value if isinstance(value, (*CONSTANTS, types.FunctionType)) else type(value)
    name = f"{getattr(source, '__module__', '')}.{getattr(source, '__qualname__', source.__name__)}"
    return f"{name} {value.dtype} {list(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else name


def in_order(values: Iterable) -> list[Any]:
    """What a set holds, as far as possible in an order that is the same in each process."""
    return sorted(values, key=lambda value: (signature_of(value), repr(value) if type(value) in PLAIN else ""))


def _layout(tensor: Tensor) -> list[Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [dtype, tensor.storage_offset(), list(tensor.shape), list(tensor.stride())]


def _device_name(device: torch.device, usual: torch.device) -> str | None:
    return None if device.type == usual.type else str(device)


def _refusal(value: object, place: Place, reason: str) -> InexactError:
    return InexactError(f"{path_of(place)}, a {type(value).__name__}, cannot be saved: {reason}")


def misfit(reason: str) -> SettingError:
    """The error of a state that does not fit the objects."""
    return SettingError(f"The saved state does not fit; it is of other arguments or another version: {reason}.")
