"""Statements for one row as a C++ function of a batch, built by the machine's compiler, once for each code.

The loop takes as many rows at a time as a vector register of the processor holds. It uses PyTorch's own vector
functions, so that results are those of PyTorch's operations up to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import cpp_extension

from torchrl_trpo.kernels.lanes import Lane, Statement

ROWS_AT_A_TIME = 16
"""Buffers have a multiple of as many rows, the most that a register holds."""
_STATEMENTS_OF_A_PART = 1000  # a compiler's time grows faster than the length of a function
_ISA = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}
_FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w")
_CODE = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "min": "at::vec::minimum({}, {})",
    "max": "at::vec::maximum({}, {})",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "and": "{} & {}",
    "or": "{} | {}",
    "xor": "{} ^ {}",
    "not": "{} ^ TRUE",
    "where": "where({}, {}, {})",
    "neg": "{}.neg()",
    "abs": "{}.abs()",
    "sqrt": "{}.sqrt()",
    "sin": "{}.sin()",
    "cos": "{}.cos()",
    "tan": "{}.tan()",
    "exp": "{}.exp()",
    "log": "{}.log()",
    "reciprocal": "V(1.0f) / {}",
    "atan2": "{}.atan2({})",
    "pow": "{}.pow({})",
    "sign": "sign({})",
    "logaddexp": "logaddexp({}, {})",
    "isnan": "isnan({})",
    "floordiv": "floordiv({}, {})",
    "mod": "mod({}, {})",
    "nonzero": "{} != V(0.0f)",
    "one": "{} & V(1.0f)",
    "trunc": "{}.trunc()",
    "same": "{}",
}
_C_TYPES = {"f": "float", "b": "uint8_t", "i": "int64_t", "j": "int32_t"}  # of the buffers
_LOAD = {"f": "V::loadu((const float*){})", "b": "load_bool((const uint8_t*){})"}
_LOAD |= {kind: f"load_int((const {_C_TYPES[kind]}*){{}})" for kind in "ij"}
_LOAD_SHARED = {"f": "V(*((const float*){}))", "b": "(*((const uint8_t*){}) ? TRUE : V(0.0f))"}
_LOAD_SHARED |= {kind: f"V((float)*((const {_C_TYPES[kind]}*){{}}))" for kind in "ij"}
_STORE = {"f": "({1}).store((float*){0})", "b": "store_bool((uint8_t*){0}, {1})"}
_STORE |= {kind: f"store_int(({_C_TYPES[kind]}*){{0}}, {{1}})" for kind in "ij"}
_HEAD = r"""
#include <ATen/cpu/vec/vec.h>
#include <atomic>
#include <cstdint>
using V = at::vec::Vectorized<float>;
static constexpr int W = V::size();
static const V TRUE = V(0.0f) == V(0.0f);
static inline V where(V condition, V value, V other) { return V::blendv(other, value, condition); }
static inline bool none(V mask) { return mask.zero_mask() == (1LL << W) - 1; }
static inline V isnan(V a) { return a != a; }
static inline V load_bool(const uint8_t* p) {
  uint32_t t[W];
  for (int k = 0; k < W; k++) t[k] = p[k] ? 0xffffffffu : 0u;
  return V::loadu(t);
}
template <typename T> static inline V load_int(const T* p) {
  float t[W];
  for (int k = 0; k < W; k++) t[k] = (float)p[k];
  return V::loadu(t);
}
static inline void store_bool(uint8_t* p, V v) {
  uint32_t t[W];
  v.store(t);
  for (int k = 0; k < W; k++) p[k] = t[k] != 0;
}
template <typename T> static inline void store_int(T* p, V v) {
  float t[W];
  v.store(t);
  for (int k = 0; k < W; k++) p[k] = (T)t[k];
}
static inline V sign(V a) { return where(a > V(0.0f), V(1.0f), where(a < V(0.0f), V(-1.0f), V(0.0f))); }
static inline V logaddexp(V a, V b) {
  V sum = at::vec::maximum(a, b) + (a - b).abs().neg().exp().log1p();
  return where((a == b) & (a.abs() == V(INFINITY)), a, sum);
}
static inline V mod(V a, V b) {
  V r = a.fmod(b);
  return where((r != V(0.0f)) & ((r < V(0.0f)) ^ (b < V(0.0f))), r + b, r);
}
static inline V floordiv(V a, V b) {
  V r = a.fmod(b);
  V q = (a - r) / b;
  q = where((r != V(0.0f)) & ((r < V(0.0f)) ^ (b < V(0.0f))), q - V(1.0f), q);
  V f = q.floor();
  f = where(q - f > V(0.5f), f + V(1.0f), f);
  return where(b == V(0.0f), a / b, where(q == V(0.0f), V(0.0f), f));
}
"""
_LARGEST_INT = 2**23  # up to which float32 holds whole numbers, with room for one addition


class Store(NamedTuple):
    """A lane or constant that the function writes.

    Attributes:
        value: the lane or constant.
        kind: its kind.
        buffer: the number of the output buffer.
        row: the row of the buffer.
    """

    value: Any
    kind: str
    buffer: int
    row: int


class Guard(NamedTuple):
    """What must hold for the results to be right.

    Attributes:
        value: the lane or constant.
        expected: the value that it must have in all rows.
    """

    value: Any
    expected: Any


def source(
    statements: Sequence[Statement],
    inputs: Mapping[str, tuple[int, int]],
    stores: Sequence[Store],
    guards: Sequence[Guard],
) -> str:
    """Writes the function.

    Args:
        statements: the statements.
        inputs: by the names of the inputs, the number of the input buffer and the row where they begin.
        stores: what is written.
        guards: what must hold.

    Returns:
        C++ code with ``int run(int64_t n_rows, int64_t n_padded, const void* const* inputs, void* const* outputs)``.
        The buffers are ``[lanes, n_padded]``, those of shared inputs ``[lanes]``. It returns whether the guards hold.
        What any row of the batch has is known after the loop. So it is taken to be as in the last call, and the loop
        runs again if it is not: each depends on earlier ones only, so this ends.
    """
    n_any = 0
    lines: list[tuple[int | None, str, list[int]]] = []  # the lane that a line makes, the line, and the lanes it reads
    reads = [value for value, *_ in (*stores, *guards) if isinstance(value, Lane)]
    for index in _needed(statements, reads):
        operation, kind, arguments = statements[index]
        if operation in {"load", "shared"}:
            name, lane = arguments
            buffer, row = inputs[name]
            pattern, place = (_LOAD, f"{row + lane} * P + i") if operation == "load" else (_LOAD_SHARED, row + lane)
            lines.append((index, pattern[kind].format(f"(({_C_TYPES[kind]}*)in[{buffer}] + {place})"), []))
        elif operation == "any":
            (value,) = arguments
            lines.append((index, f"any[{n_any}]", []))
            lines.append((None, f"hit[{n_any}] = hit[{n_any}] | ({_term(value)} & valid)", [value.number]))
            n_any += 1
        else:
            code = _CODE[operation].format(*(_term(argument) for argument in arguments))
            lines.append((index, code, [argument.number for argument in arguments if isinstance(argument, Lane)]))
        if kind in {"i", "j"} and operation != "where":
            lines.append((None, f"fail = fail | (v{index}.abs() > V({_LARGEST_INT}.0f))", [index]))
    for value, kind, buffer, row in stores:
        code = _STORE[kind].format(f"(({_C_TYPES[kind]}*)out[{buffer}] + {row} * P + i)", _term(value))
        lines.append((None, code, [value.number] if isinstance(value, Lane) else []))
    for value, expected in guards:
        wrong = f"({_term(value)} {'^' if isinstance(expected, bool) else '!='} {_term(expected)})"
        lines.append((None, f"fail = fail | {wrong}", [value.number] if isinstance(value, Lane) else []))
    parts, n_kept = _parts(lines)
    signature = (
        "int64_t i, int64_t P, const void* const* in, void* const* out, V* kept, V& fail, const V* any, V* hit, V valid"
    )
    functions = "\n".join(
        f"static __attribute__((noinline)) void part{number}({signature}) {{\n{code}\n}}"
        for number, code in enumerate(parts)
    )
    calls = " ".join(f"part{number}(i, P, in, out, kept, fail, any, hit, valid);" for number in range(len(parts)))
    return f"""{_HEAD}
{functions}
extern "C" int run(int64_t n_rows, int64_t P, const void* const* in, void* const* out) {{
  constexpr int N_ANY = {n_any};
  static std::atomic<bool> last[N_ANY + 1];
  V kept[{max(1, n_kept)}], any[N_ANY + 1], hit[N_ANY + 1], wrong;
  for (int k = 0; k < N_ANY; k++) any[k] = last[k] ? TRUE : V(0.0f);
  for (bool again = true; again;) {{
    for (auto& each : hit) each = V(0.0f);
    wrong = V(0.0f);
    for (int64_t i = 0; i < n_rows; i += W) {{
      const V valid = i + W <= n_rows ? TRUE : V::arange(0.0f, 1.0f) < V((float)(n_rows - i));
      V fail(0.0f);
      {calls}
      wrong = wrong | (fail & valid);
    }}
    again = false;
    for (int k = 0; k < N_ANY; k++) {{
      const bool found = !none(hit[k]);
      again = again || found == none(any[k]);
      any[k] = found ? TRUE : V(0.0f);
      last[k] = found;
    }}
  }}
  return none(wrong);
}}
"""


def _needed(statements: Sequence[Statement], reads: Sequence[Lane]) -> list[int]:
    """The statements whose results are used, in order."""
    needed: set[int] = set()
    pending = [lane.number for lane in reads]
    while pending:
        index = pending.pop()
        if index not in needed:
            needed.add(index)
            pending += [each.number for each in statements[index].arguments if isinstance(each, Lane)]
    return sorted(needed)


def _parts(lines: Sequence[tuple[int | None, str, list[int]]]) -> tuple[list[str], int]:
    """The lines in functions of bounded length; what a later one reads is kept in an array. Returns its length too."""
    size = _STATEMENTS_OF_A_PART
    part_of = {lane: number // size for number, (lane, *_) in enumerate(lines) if lane is not None}
    kept: dict[int, int] = {}
    for number, (_, _, reads) in enumerate(lines):
        for read in reads:
            if part_of[read] != number // size:
                kept.setdefault(read, len(kept))
    parts = []
    for start in range(0, len(lines), size):
        here: set[int] = set()
        code = []
        for made, line, reads in lines[start : start + size]:
            for read in reads:
                if part_of[read] != start // size and read not in here:
                    here.add(read)
                    code.append(f"  const V v{read} = kept[{kept[read]}];")
            code.append(f"  {line};" if made is None else f"  const V v{made} = {line};")
            if made in kept:
                code.append(f"  kept[{kept[made]}] = v{made};")
        parts.append("\n".join(code))
    return parts, len(kept)


def _term(value: Any) -> str:
    """A lane or a constant in C++."""
    if isinstance(value, Lane):
        return f"v{value.number}"
    if isinstance(value, bool):
        return "TRUE" if value else "V(0.0f)"
    if math.isinf(value):
        return "V(INFINITY)" if value > 0 else "V(-INFINITY)"
    return "V(NAN)" if math.isnan(value) else f"V({float(value)!r}f)"


class CompilerError(Exception):
    """There is no compiler, or it refuses the code."""


def build(code: str) -> Any:
    """Compiles a function of :func:`source` and loads it; code that has been compiled before is only loaded.

    The libraries are in ``$TORCHRL_TRPO_CACHE``, by default ``~/.cache/torchrl_trpo``, by code, PyTorch and processor.

    Args:
        code: the code.

    Returns:
        The function, of ``ctypes``.

    Raises:
        CompilerError: if there is no C++ compiler, it fails, or the libraries' folder cannot be written.
    """
    command = [*_compiler(), *_FLAGS]
    key = hashlib.sha256("\n".join([code, *command, torch.__version__]).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("TORCHRL_TRPO_CACHE") or Path.home() / ".cache" / "torchrl_trpo")
    library = folder / f"{key}.so"
    try:
        if not library.exists():
            _compile(code, command, library)
        function = ctypes.CDLL(str(library)).run
    except OSError as error:
        raise CompilerError(f"{library} cannot be written or loaded: {error}") from error
    function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def _compile(code: str, command: Sequence[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        file = Path(scratch, "kernel.cpp")
        file.write_text(code)
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        arguments = [*command, *include, str(file), "-o", str(file.with_suffix(".so")), *libraries]
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
    defines = f"-DCPU_CAPABILITY_{capability}", f"-DCPU_CAPABILITY={capability}"
    return (compiler, *defines, *_ISA.get(capability, ()))
