"""The state of Python objects as plain data, to be put into the objects that the same program builds in a new process.

A program that builds its objects twice in the same way has the same objects at the same paths, with other contents. So
an object that exists from the beginning is saved as its path and its content, and the object at that path of the new
process takes the content over: no classes and no code are saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchrl_trpo.envs.object_graph import path_of, walk
from torchrl_trpo.envs.plain_data import PLAIN, Reader, Writer, misfit, parts_to_save, saved_kind_of, signature_of

_DATA = {"tensor", "array", "dict", "list", "set"}
_FIXED = {"object", "closure", "stateful"}


class ObjectState:
    """The state of everything that some objects hold: saved here, and loaded into their counterparts.

    Make it when the objects have just been built. Objects that exist then keep their identity, and tensors and arrays
    also their memory: a closure that holds one sees the loaded values. Objects that came later are made anew: numbers,
    tensors, arrays, lists, tuples, dicts, sets, and plain objects of a class that was known at the beginning. Places
    that shared an object share it afterwards too, and tensors that shared memory share it.

    Generators of random numbers are included, but not the global ones, nor other global variables, nor attributes of
    classes. A value that cannot be saved exactly is refused, with an error that says where it is.

    An object is identified by the shortest path to it from one of the ``roots``, so an object to which others refer at
    random, such as the goal among the landmarks, should be a root itself. A state may be loaded on another device than
    it was saved on: tensors that were on the old ``device`` go to the new one.
    """

    def __init__(self, roots: Mapping[str, object], device: torch.device) -> None:
        self._roots = dict(roots)
        self._device = device
        self._objects: dict[str, Any] = {}  # by path; classes, modules and built-in functions by their name
        self._signatures: dict[str, str] = {}  # two objects with the same path are counterparts if these are equal
        for value, place, first in walk(self._roots.items(), parts_to_save, breadth_first=True):
            if not first or type(value) in PLAIN:
                continue
            kind = saved_kind_of(value)
            name = signature_of(value) if kind == "constant" else path_of(place)
            if kind in {"constant", *_FIXED, *_DATA} and name not in self._objects:
                self._objects[name] = value
                if kind != "constant":
                    self._signatures[name] = f"{kind} {signature_of(value)}"

    @torch.no_grad()
    def save(self, *values: object) -> dict[str, Any]:
        """Copies the state, and further values, which the objects do not hold.

        It is made of dicts with strings as keys, and lists, of tensors, numbers, strings, booleans and None, which
        ``torch.load`` reads with ``weights_only=True``. It raises InexactError if something cannot be saved.
        """
        writer = Writer(self._objects, self._device)
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
        """Puts a saved state into the objects, and gives the values that were saved with it.

        It raises SettingError if the state is of objects that were built differently; nothing has changed then.
        """
        ours, theirs = self._signatures, state["objects"]
        for name in [*ours, *theirs]:
            now, then = ours.get(name), theirs.get(name)
            # A reset draws who shares a tensor with whom, and so where it is first met.
            if now != then and (None not in {now, then} or (now or then).split()[0] in _FIXED):
                raise misfit(f"{name} is {now or 'missing'} here, and {then or 'missing'} there")
        reader = Reader(state, self._objects, self._device)
        reader.fill()
        return [reader.value(reference) for reference in state["values"]]
