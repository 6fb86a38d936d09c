"""Which attributes of objects, and which tensors, code reads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchrl_trpo.envs.branches import replaced


@contextlib.contextmanager
def attribute_reads(
    objects: Mapping[str, Any], found: set[str], written_first: set[str] | None = None
) -> Iterator[None]:
    """Notes which attributes of objects are read inside the context.

    It does so by ``__getattribute__`` of their classes. Where a class does not let itself be changed, or where the code
    reads ``__dict__``, all attributes are taken to be read.

    Args:
        objects: the objects, by their paths.
        found: the paths of what is read, which are added to.
        written_first: the paths of what is written before it is read, which are added to.
    """
    paths = {id(value): path for path, value in objects.items()}
    attributes = {path: [*vars(value)] for path, value in objects.items()}
    originals: dict[type, Any] = {type(value): type(value).__getattribute__ for value in objects.values()}

    def read_all(path: str) -> None:
        found.update(f"{path}.{name}" for name in attributes[path])

    def noting(original: Any) -> Callable[[Any, str], Any]:
        def __getattribute__(self: Any, name: str) -> Any:
            if (path := paths.get(id(self))) is not None:
                found.add(f"{path}.{name}")
                if name == "__dict__" and not sys._getframe(1).f_globals.get("__name__", "").startswith(__package__):
                    read_all(path)
            return original(self, name)

        return __getattribute__

    def noting_writes(original: Any) -> Callable[[Any, str, Any], None]:
        def __setattr__(self: Any, name: str, value: Any) -> None:
            if (path := f"{paths.get(id(self))}.{name}") not in found and written_first is not None:
                written_first.add(path)
            original(self, name, value)

        return __setattr__

    with contextlib.ExitStack() as stack:
        for cls, original in originals.items():
            try:
                noted = {"__getattribute__": noting(original), "__setattr__": noting_writes(cls.__setattr__)}
                stack.enter_context(replaced(cls, noted))
            except TypeError:
                for path, value in objects.items():
                    if type(value) is cls:
                        read_all(path)
        yield


class TensorReads(TorchDispatchMode):
    """Notes the tensors that operations read inside the context, those that they write to too.

    Attributes:
        found: their identities.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not name.endswith("_like") and not name.startswith("new_"):  # which read a shape
            self.found.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))
