"""A GPU that is not there: the device ``fake``, on the host's memory. Import it, then use ``device="fake"``."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import time
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

NAME = "fake"
_here = Path(__file__).parent
_build = Path(os.environ.get("FAKEGPU_BUILD", _here / "build"))
_build.mkdir(exist_ok=True, parents=True)

_module = types.ModuleType(f"torch.{NAME}")


def _state(device=None):
    return torch.Generator.get_state(_ext.default_generator())


_module.is_available = lambda: True
_module.is_initialized = lambda: True
_module.device_count = lambda: 1
_module.current_device = lambda: 0
_module.set_device = lambda device: None
_module._is_in_bad_fork = lambda: False
_module._lazy_init = lambda: None
_module.get_rng_state = _state
_module.set_rng_state = lambda state, device=None: _ext.default_generator().set_state(state)
_module.manual_seed_all = lambda seed: _ext.default_generator().manual_seed(seed)
_module.manual_seed = _module.manual_seed_all
_module.synchronize = lambda device=None: _seen("sync", "synchronize", 0)
_module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]


@contextlib.contextmanager
def _device(device):
    yield


_module.device = _device

torch.utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, _module)
torch.utils.generate_methods_for_privateuse1_backend()
_start = time.perf_counter()
_ext = load(
    "fakegpu_ext",
    [str(_here / "fakegpu.cpp")],
    build_directory=str(_build),
    extra_cflags=["-O0", "-g0", "-w"],
    verbose=False,
)
build_seconds = time.perf_counter() - _start

_recorders: list[Recorder] = []
WAITS = {"item", "device_to_host", "host_to_device", "shape", "nonzero", "sync"}


def _seen(kind: str, op: str, size: int) -> None:
    if not _recorders:
        return
    frame, stack = sys._getframe(1), []
    while frame is not None and len(stack) < 60:
        stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    for recorder in _recorders:
        recorder.add(kind, op, size, stack)


_ext.set_hook(_seen)
_ext.set_poison(os.environ.get("FAKEGPU_POISON", "1") == "1")


class Recorder:
    """Counts kernels, and what would make the host wait for the device, with where it was asked for."""

    def __init__(self) -> None:
        self.events: collections.Counter = collections.Counter()
        self.bytes: collections.Counter = collections.Counter()
        self.kernels = 0

    def __enter__(self) -> Recorder:
        self._before = _ext.kernels()
        _recorders.append(self)
        return self

    def __exit__(self, *_) -> None:
        _recorders.remove(self)
        self.kernels += _ext.kernels() - self._before

    def add(self, kind, op, size, stack) -> None:
        key = (kind, op, tuple(stack))
        self.events[key] += 1
        self.bytes[key] += size

    def counts(self, kinds=WAITS) -> collections.Counter:
        out = collections.Counter()
        for (kind, _, _), n in self.events.items():
            if kind in kinds:
                out[kind] += n
        return out

    @staticmethod
    def owner(stack) -> tuple[str, str]:
        """Whose line it is (the innermost of the packages that are looked at), and the line of the product below."""
        innermost = product = ""
        for file, line, function in stack:
            package = _package(file)
            if package and not innermost:
                innermost = f"{package}:{_short(file)}:{line} {function}"
            if package == "product" and not product:
                product = f"{_short(file)}:{line} {function}"
        return innermost, product

    def table(self, kinds=WAITS, per: float = 1.0, limit: int = 40) -> str:
        rows = collections.Counter()
        for (kind, op, stack), n in self.events.items():
            if kind in kinds:
                rows[(kind, op, *self.owner(stack))] += n
        lines = [
            f"{n / per:9.2f}  {kind:15s} {op:32s} {inner}   <- {product}"
            for (kind, op, inner, product), n in rows.most_common(limit)
        ]
        return "\n".join(lines)


_PACKAGES = ("vmas", "torchrl", "tensordict")


def _package(file: str) -> str:
    parts = Path(file).parts
    if "site-packages" in parts:
        name = parts[parts.index("site-packages") + 1]
        return name if name in _PACKAGES else ""
    if "lib" in parts and any(part.startswith("python3") for part in parts):
        return ""
    return (
        "product"
        if {"torchrl_trpo", "objectives", "recipes"} & set(parts)
        else "script"
        if file.endswith(".py") and "fakegpu" not in parts
        else ""
    )


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])
