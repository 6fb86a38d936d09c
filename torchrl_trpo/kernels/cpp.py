"""Statements for one row as a C++ function of a batch.

The loop takes as many rows at a time as a vector register of the processor holds. It uses PyTorch's own vector
functions, so that results are those of PyTorch's operations up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchrl_trpo.kernels.lanes import Statement
from torchrl_trpo.kernels.writer import DERIVED, FUNCTIONS, FUNCTIONS_OF_TWO, Guard, Store, write

ROWS_AT_A_TIME = 16
"""Buffers have a multiple of as many rows, the most that a register holds."""
HEAD = r"""
#include <ATen/cpu/vec/vec.h>
#include <atomic>
#include <cstdint>
#define FN static inline
#define PART static __attribute__((noinline)) void
using V = at::vec::Vectorized<float>;
using F = V;
using B = V;
static constexpr int W = V::size();
static const V FALSE(0.0f), TRUE = FALSE == FALSE;
FN V where(V condition, V value, V other) { return V::blendv(other, value, condition); }
FN V only(V v, V valid) { return v & valid; }
FN bool none(V mask) { return mask.zero_mask() == (1LL << W) - 1; }
FN V minimum(V a, V b) { return at::vec::minimum(a, b); }
FN V maximum(V a, V b) { return at::vec::maximum(a, b); }
FN V neg_of(V a) { return a.neg(); }
FN V abs_of(V a) { return a.abs(); }
FN V load(const float* p) { return V::loadu(p); }
FN V load(const uint8_t* p) {
  uint32_t t[W];
  for (int k = 0; k < W; k++) t[k] = p[k] ? 0xffffffffu : 0u;
  return V::loadu(t);
}
template <typename T> FN V load(const T* p) {
  float t[W];
  for (int k = 0; k < W; k++) t[k] = (float)p[k];
  return V::loadu(t);
}
FN V shared(const uint8_t* p) { return *p ? TRUE : FALSE; }
template <typename T> FN V shared(const T* p) { return V((float)*p); }
FN void store(float* p, V v) { v.store(p); }
FN void store(uint8_t* p, V v) {
  uint32_t t[W];
  v.store(t);
  for (int k = 0; k < W; k++) p[k] = t[k] != 0;
}
template <typename T> FN void store(T* p, V v) {
  float t[W];
  v.store(t);
  for (int k = 0; k < W; k++) p[k] = (T)t[k];
}
template <typename T> FN void store_rows(T* p, int64_t stride, int64_t n, V v) {
  float t[W];
  v.store(t);
  for (int k = 0; k < W && k < n; k++) p[k * stride] = std::is_same_v<T, bool> ? (((uint32_t*)t)[k] != 0) : (T)t[k];
}
// a lane of an input; all rows read the same one
FN V load_lane(const float* p, V lane, int64_t n_padded, int64_t i) {
  float t[W];
  lane.store(t);
  return V::loadu(p + (int64_t)t[0] * n_padded + i);
}
// the number at a place of a table, for each row
FN V take(const V* table, int length, V place) {
  float p[W], t[W];
  place.store(p);
  for (int k = 0; k < W; k++) t[k] = ((const float*)(table + (p[k] >= 0 && p[k] < length ? (int)p[k] : 0)))[k];
  return V::loadu(t);
}
FN void put(V* table, int length, V place, V value) {
  float p[W], t[W];
  place.store(p);
  value.store(t);
  for (int k = 0; k < W; k++)
    if (p[k] >= 0 && p[k] < length) ((float*)(table + (int)p[k]))[k] = t[k];
}
// y = x w for W rows at once: y[j] is the sum over k of x[k] w[k * SK + j * SN]
template <int K, int SK, int SN, int B> FN void some_columns(const V* x, const float* w, V* y) {
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
FN V tanh_of(V a) {
  using at::vec::fmadd;
  const V z = a * a;
  V p = fmadd(z, V(-0.005717033f), V(0.020650575f));
  p = fmadd(z, fmadd(z, fmadd(z, p, V(-0.053743493f)), V(0.13331491f)), V(-0.33333284f));
  const V far = (V(1.0f) - V(2.0f) / ((a.abs() * V(2.0f)).exp() + V(1.0f))).copysign(a);
  return where(a.abs() < V(0.625f), fmadd(p * z, a, a), far);
}
"""
HEAD += "".join(f"FN V {name}_of(V a) {{ return a.{name}(); }}\n" for name in FUNCTIONS)
HEAD += "".join(f"FN V {name}_of(V a, V b) {{ return a.{name}(b); }}\n" for name in FUNCTIONS_OF_TWO) + DERIVED
"""What the code of functions needs before it."""
_PARAMETERS = (
    "int64_t i, int64_t n, int64_t P, const void* const* in, void* const* out, const int64_t* S, "
    "V* kept, V* scratch, V& fail, const V* any, V* hit, V valid"
)


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
        has is known after the loop. So it is taken to be as in the last call, and the loop runs again if it is not, and
        that matters to a row: each depends on earlier ones only, so this ends.
    """
    code = write(statements, inputs, stores, guards, _PARAMETERS)
    return f"""{code.functions}
extern "C" int run(int64_t n, int64_t P, const void* const* in, void* const* out, const int64_t* S) {{
  constexpr int N_ANY = {code.n_any};
  static std::atomic<bool> last[N_ANY + 1];
  V kept[{code.n_kept + 1}], scratch[{code.n_scratch + 1}], any[N_ANY + 1], hit[2 * N_ANY + 1], wrong;
  for (int k = 0; k < N_ANY; k++) any[k] = last[k] ? TRUE : V(0.0f);
  for (bool again = true; again;) {{
    for (auto& each : hit) each = V(0.0f);
    wrong = V(0.0f);
    for (int64_t i = 0; i < n; i += W) {{
      const V valid = i + W <= n ? TRUE : V::arange(0.0f, 1.0f) < V((float)(n - i));
      V fail(0.0f);
      {code.calls}
      wrong = wrong | (fail & valid);
    }}
    again = false;
    for (int k = 0; k < N_ANY; k++) {{
      const bool found = !none(hit[2 * k]);
      again = again || (found == none(any[k]) && !none(hit[2 * k + 1]));
      any[k] = found ? TRUE : V(0.0f);
      last[k] = found;
    }}
  }}
  return none(wrong);
}}
"""
