"""Statements for one row as a C++ function of a batch.

The loop takes as many rows at a time as a vector register of the processor holds. It uses PyTorch's own vector
functions, so that results are those of PyTorch's operations up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torchrl_trpo.kernels.lanes import InMemory, Items, Lane, Lanes, Statement, Statements

ROWS_AT_A_TIME = 16
"""Buffers have a multiple of as many rows, the most that a register holds."""
_STATEMENTS_OF_A_PART = 1000  # a compiler's time grows faster than the length of a function
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
    "log1p": "{}.log1p()",
    "expm1": "{}.expm1()",
    "tanh": "tanh_of({})",
    "atanh": "{}.atanh()",
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
template <typename T> static inline void store_rows(T* p, int64_t stride, int64_t n, V v) {
  float t[W];
  v.store(t);
  for (int k = 0; k < W && k < n; k++) p[k * stride] = std::is_same_v<T, bool> ? (((uint32_t*)t)[k] != 0) : (T)t[k];
}
// y = x w for W rows at once: y[j] is the sum over k of x[k] w[k * SK + j * SN]
template <int K, int SK, int SN, int B> static inline void some_columns(const V* x, const float* w, V* y) {
  V sums[B];
#pragma GCC unroll 16
  for (int j = 0; j < B; j++) sums[j] = V(0.0f);
  for (int k = 0; k < K; k++) {
    const V each = x[k];
#pragma GCC unroll 16
    for (int j = 0; j < B; j++) sums[j] = at::vec::fmadd(each, V(w[k * SK + j * SN]), sums[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < B; j++) y[j] = sums[j];
}
template <int K, int SK, int SN, int N>
static __attribute__((noinline)) void linear(const V* x, const float* w, V* y) {
  int j = 0;
  for (; j + W <= N; j += W) some_columns<K, SK, SN, W>(x, w + j * SN, y + j);
  if constexpr (N % W) some_columns<K, SK, SN, N % W>(x, w + j * SN, y + j);
}
// the polynomial is the best of its degree for tanh(a) / a, with an error of 4e-9
static inline V tanh_of(V a) {
  using at::vec::fmadd;
  const V z = a * a;
  V p = fmadd(z, V(-0.005717033f), V(0.020650575f));
  p = fmadd(z, fmadd(z, fmadd(z, p, V(-0.053743493f)), V(0.13331491f)), V(-0.33333284f));
  const V far = (V(1.0f) - V(2.0f) / ((a.abs() * V(2.0f)).exp() + V(1.0f))).copysign(a);
  return where(a.abs() < V(0.625f), fmadd(p * z, a, a), far);
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
_PARAMETERS = (
    "int64_t i, int64_t n, int64_t P, const void* const* in, void* const* out, const int64_t* S, "
    "V* kept, V* scratch, V& fail, const V* any, V* hit, V valid"
)
_LARGEST_INT = 2**23  # up to which float32 holds whole numbers, with room for one addition


class Store(NamedTuple):
    """A lane or constant that the function writes.

    Attributes:
        value: the lane or constant.
        kind: its kind.
        buffer: the number of the output buffer.
        row: the row of the buffer.
        by_row: whether the buffer is ``[n_rows, ...]`` with a stride of its own, and ``row`` the place in a row.
    """

    value: Any
    kind: str
    buffer: int
    row: int
    by_row: bool = False


class Guard(NamedTuple):
    """What must hold for the results to be right.

    Attributes:
        value: the lane or constant.
        expected: the value that it must have in all rows.
    """

    value: Any
    expected: Any

    @classmethod
    def of(cls, statements: Statements, lanes: Lanes, expected: Any) -> Guard:
        """The guard of a tensor without dimensions."""
        kind = "b" if isinstance(expected, bool) else lanes.kind
        return cls(statements.convert(lanes.values.reshape(-1)[0], kind), expected)


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
        C++ code with ``int run(int64_t n_rows, int64_t n_padded, const void* const* inputs, void* const* outputs, const
        int64_t* strides)``. The buffers are ``[lanes, n_padded]``, those of shared inputs ``[lanes]``. ``strides`` are
        those of the outputs that are stored by row. Behind the rows, outputs are zero: vector functions may choose
        their way by all numbers of a register. The function returns whether the guards hold. What any row of the batch
        has is known after the loop. So it is taken to be as in the last call, and the loop runs again if it is not:
        each depends on earlier ones only, so this ends.
    """
    lines = []
    n_any, scratch = 0, _Scratch(statements)
    for index in _needed(statements, [value for value, *_ in (*stores, *guards) if isinstance(value, Lane)]):
        operation, kind, arguments = statements[index]
        if operation in {"linear", "map"}:
            lines.append(Line(None, getattr(scratch, operation)(index, arguments, inputs), _lanes(arguments)))
            continue
        if operation == "item":
            lines.append(Line(index, scratch.item(*arguments), []))
        elif operation in {"load", "shared"}:
            lines.append(Line(index, _load(statements[index], inputs), []))
        elif operation == "any":
            lines.append(Line(index, f"any[{n_any}]", []))
            hit = f"hit[{n_any}] = hit[{n_any}] | ({_term(arguments[0])} & valid)"
            lines.append(Line(None, hit, _lanes(arguments)))
            n_any += 1
        else:
            lines.append(Line(index, _CODE[operation].format(*map(_term, arguments)), _lanes(arguments)))
        if kind in {"i", "j"} and operation != "where":
            lines.append(Line(None, f"fail = fail | (v{index}.abs() > V({_LARGEST_INT}.0f))", [index]))
    for store in stores:
        lines.append(Line(None, _store(store), _lanes([store.value])))
    for value, expected in guards:
        wrong = f"({_term(value)} {'^' if isinstance(expected, bool) else '!='} {_term(expected)})"
        lines.append(Line(None, f"fail = fail | {wrong}", _lanes([value])))
    parts, n_kept = _parts(lines)
    functions = "\n".join(
        f"static __attribute__((noinline)) void part{number}({_PARAMETERS}) {{\n{code}\n}}"
        for number, code in enumerate(parts)
    )
    arguments_of_part = "i, n, P, in, out, S, kept, scratch, fail, any, hit, valid"
    calls = " ".join(f"part{number}({arguments_of_part});" for number in range(len(parts)))
    return f"""{_HEAD}
{functions}
extern "C" int run(int64_t n, int64_t P, const void* const* in, void* const* out, const int64_t* S) {{
  constexpr int N_ANY = {n_any};
  static std::atomic<bool> last[N_ANY + 1];
  V kept[{max(1, n_kept)}], scratch[{max(1, scratch.size)}], any[N_ANY + 1], hit[N_ANY + 1], wrong;
  for (int k = 0; k < N_ANY; k++) any[k] = last[k] ? TRUE : V(0.0f);
  for (bool again = true; again;) {{
    for (auto& each : hit) each = V(0.0f);
    wrong = V(0.0f);
    for (int64_t i = 0; i < n; i += W) {{
      const V valid = i + W <= n ? TRUE : V::arange(0.0f, 1.0f) < V((float)(n - i));
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


class Line(NamedTuple):
    """A line of code, the lane that it makes, and the lanes that it reads."""

    lane: int | None
    code: str
    reads: list[int]


class _Scratch:
    """Memory for the results of statements that have several: numbers that are next to each other."""

    def __init__(self, statements: Sequence[Statement]) -> None:
        self.size = max((len(each.arguments) for each in statements if each.operation == "linear"), default=0)
        self._first: dict[int, int] = {}

    def linear(self, index: int, arguments: Sequence[Any], inputs: Mapping[str, tuple[int, int]]) -> str:
        """A product of a vector and a matrix in memory."""
        name, first, *steps, n_outputs = arguments[:5]
        terms, code, vector = arguments[5:], "", "scratch"
        if isinstance(terms[0], Items):
            vector = f"scratch + {self._first[terms[0].block] + terms[0].first}"
            n_inputs = terms[0].length
        else:
            code = " ".join(f"scratch[{number}] = {_term(term)};" for number, term in enumerate(terms))
            n_inputs = len(terms)
        buffer, row = inputs[name]
        template = ", ".join(map(str, (n_inputs, *steps, n_outputs)))
        place = f"(const float*)in[{buffer}] + {row + first}"
        return f"{code} linear<{template}>({vector}, {place}, scratch + {self._take(index, n_outputs)})"

    def map(self, index: int, arguments: Sequence[Any], inputs: Mapping[str, tuple[int, int]]) -> str:
        """An operation on each number of vectors."""
        operation, length, *operands = arguments
        terms = []
        for operand in operands:
            if isinstance(operand, Items):
                terms.append(f"scratch[{self._first[operand.block] + operand.first} + j]")
            elif isinstance(operand, InMemory):
                buffer, row = inputs[operand.name]
                terms.append(f"V(((const float*)in[{buffer}])[{row + operand.first} + j * {operand.step}])")
            else:
                terms.append(_term(operand))
        first = self._take(index, length)
        return f"for (int j = 0; j < {length}; j++) scratch[{first} + j] = {_CODE[operation].format(*terms)}"

    def item(self, items: Items) -> str:
        return f"scratch[{self._first[items.block] + items.first}]"

    def _take(self, index: int, length: int) -> int:
        self._first[index] = self.size
        self.size += length
        return self._first[index]


def _load(statement: Statement, inputs: Mapping[str, tuple[int, int]]) -> str:
    operation, kind, (name, lane) = statement
    buffer, row = inputs[name]
    pattern, place = (_LOAD, f"{row + lane} * P + i") if operation == "load" else (_LOAD_SHARED, row + lane)
    return pattern[kind].format(f"(({_C_TYPES[kind]}*)in[{buffer}] + {place})")


def _store(store: Store) -> str:
    value, kind, buffer, row, by_row = store
    if by_row:
        c_type = "bool" if kind == "b" else _C_TYPES[kind]
        return f"store_rows(({c_type}*)out[{buffer}] + {row} + i * S[{buffer}], S[{buffer}], n - i, {_term(value)})"
    return _STORE[kind].format(f"(({_C_TYPES[kind]}*)out[{buffer}] + {row} * P + i)", f"{_term(value)} & valid")


def _lanes(arguments: Sequence[Any]) -> list[int]:
    """The lanes that arguments read. Results of statements that have several are in memory."""
    return [argument.number for argument in arguments if isinstance(argument, Lane)]


def _needed(statements: Sequence[Statement], reads: Sequence[Lane]) -> list[int]:
    """The statements whose results are used, in order."""
    needed: set[int] = set()
    pending = [lane.number for lane in reads]
    while pending:
        index = pending.pop()
        if index not in needed:
            needed.add(index)
            arguments = statements[index].arguments
            pending += [*_lanes(arguments), *(each.block for each in arguments if isinstance(each, Items))]
    return sorted(needed)


def _parts(lines: Sequence[Line]) -> tuple[list[str], int]:
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
