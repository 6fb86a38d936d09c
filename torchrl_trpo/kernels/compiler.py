"""Builds C++ functions with the machine's compiler, once for each code."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils import cpp_extension
from torchrl._utils import logger

from torchrl_trpo.kernels.buffers import NotCompiled
from torchrl_trpo.kernels.cpp import HEAD

_ISA = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}
_FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w")


class CompilerError(NotCompiled):
    """There is no compiler, or it refuses the code."""


class Call(ctypes.Structure):
    """A compiled function and its arguments, as C++ sees them."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("run", "inputs", "outputs", "strides"))


class Function:
    """A function of :func:`source`, which is compiled at its first call, with all others that wait for theirs.

    A compiler begins once for all of them. Code that has been compiled before is only loaded: the libraries are in
    ``$TORCHRL_TRPO_CACHE``, by default ``~/.cache/torchrl_trpo``, by code, PyTorch and processor.

    Args:
        code: the code.
    """

    _waiting: ClassVar[list[weakref.ref[Function]]] = []

    def __init__(self, code: str) -> None:
        self.code = code
        self._run: Any = None
        self._waiting.append(weakref.ref(self))

    def __call__(self, *arguments: Any) -> int:
        """Calls the function.

        Args:
            *arguments: its arguments.

        Returns:
            Its result.
        """
        self._compile_waiting()
        return int(self._run(*arguments))

    def on(self, inputs: int, outputs: int, strides: int = 0) -> Call:
        """The function with arguments, for C++ to call.

        Args:
            inputs: where the addresses of its inputs are.
            outputs: where those of its outputs are.
            strides: where the strides of the outputs that are stored by row are.
        """
        self._compile_waiting()
        return Call(ctypes.cast(self._run, ctypes.c_void_p), inputs, outputs, strides)

    def _compile_waiting(self) -> None:
        """Compiles the function, if it is not yet, with all that wait.

        Raises:
            CompilerError: if there is no C++ compiler, it fails, or the libraries' folder cannot be written.
        """
        if self._run is None:
            others = [each for reference in self._waiting if (each := reference()) not in (None, self)]
            self._waiting.clear()
            try:
                _load([*others, self])
            except CompilerError:
                if not others:
                    raise
                self._waiting.extend(map(weakref.ref, others))
                _load([self])


def _load(functions: Sequence[Function]) -> None:
    """Compiles functions into one library, if it is not there yet, and loads it."""
    parts = [HEAD]
    for number, function in enumerate(functions):
        parts.append(f"#define run run{number}\nnamespace n{number} {{\n{function.code}\n}}\n#undef run\n")
    code, command = "".join(parts), [*_compiler(), *_FLAGS]
    key = hashlib.sha256("\n".join([code, *command, torch.__version__]).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("TORCHRL_TRPO_CACHE") or "~/.cache/torchrl_trpo")
    try:
        folder = folder.expanduser()
        library = folder / f"{key}.so"
        if not library.exists():
            _announce(folder)
            _compile(code, command, library)
        loaded = ctypes.CDLL(str(library))
    except CompilerError:
        raise
    except (OSError, RuntimeError) as error:  # also where there is no home
        raise CompilerError(f"{folder} cannot be written or loaded from: {error}") from error
    for number, function in enumerate(functions):
        function._run = getattr(loaded, f"run{number}")
        function._run.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        function._run.restype = ctypes.c_int


@functools.cache  # once
def _announce(folder: Path) -> None:
    logger.info(f"Compiling C++ functions, some seconds each. They are kept in {folder}.")


def _compile(code: str, command: Sequence[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        file = Path(scratch, "kernel.cpp")
        file.write_text(code)
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        arguments = [*command, str(file), "-o", str(file.with_suffix(".so")), *libraries]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if result.returncode:
            raise CompilerError(f"{command[0]} failed: {result.stderr.strip()[:500]}")
        file.with_suffix(".so").replace(library)  # whole, whoever else builds it


@functools.cache
def _compiler() -> tuple[str, ...]:
    """The compiler, with the flags of this processor."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise CompilerError("there is no C++ compiler. Install g++, or set CXX to one")
    capability = torch.backends.cpu.get_cpu_capability()
    return (compiler, f"-DCPU_CAPABILITY_{capability}", *_ISA.get(capability, ()))
