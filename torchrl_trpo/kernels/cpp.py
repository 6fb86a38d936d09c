"""Statements for one row as a C++ function of a batch.

The loop takes as many rows at a time as a vector register of the processor holds. Functions such as sin are those of
PyTorch's own libraries, so that results are those of PyTorch's operations up to rounding. Their headers and those of
the processor are not included: a compiler would take longer for them than for the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchrl_trpo.kernels.lanes import Statement
from torchrl_trpo.kernels.terms import DERIVED
from torchrl_trpo.kernels.writer import Guard, Store, write

ROWS_AT_A_TIME = 16
"""Buffers have a multiple of as many rows, the most that a register holds."""
HEAD = r"""
#include <stdint.h>
#if defined(CPU_CAPABILITY_AVX512)
constexpr int W = 16;
#define ROUND "vrndscaleps"
#define LIBRARY(name, precision) Sleef_##name##f16##precision
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int W = 8;
#define ROUND "vroundps"
#define LIBRARY(name, precision) Sleef_##name##f8##precision
#else
constexpr int W = 4;
#endif
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FN static inline
#define PART static __attribute__((noinline)) void
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t B __attribute__((vector_size(4 * W)));  // all bits of a number are set, or none
static const B FALSE = {}, TRUE = FALSE == FALSE;
#define F(number) ((number) - F{})
template <typename V> FN V where(B condition, V value, V other) { return condition ? value : other; }
template <typename V> FN V only(V v, B valid) { return (V)((B)v & valid); }
FN bool none(B mask) {
  int32_t found = 0;
  for (int k = 0; k < W; k++) found |= mask[k];
  return !found;
}
FN F minimum(F a, F b) { return (a != a) | (a < b) ? a : b; }
FN F maximum(F a, F b) { return (a != a) | (a > b) ? a : b; }
FN F neg_of(F a) { return -a; }
FN F abs_of(F a) { return (F)((B)a & 0x7fffffff); }
FN F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FN B load(const uint8_t* p) {
  B v;
  for (int k = 0; k < W; k++) v[k] = p[k];
  return v != 0;
}
template <typename T> FN F load(const T* p) {
  F v;
  for (int k = 0; k < W; k++) v[k] = (float)p[k];
  return v;
}
FN B shared(const uint8_t* p) { return *p ? TRUE : FALSE; }
template <typename T> FN F shared(const T* p) { return F((float)*p); }
FN void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
FN void store(uint8_t* p, B v) {
  for (int k = 0; k < W; k++) p[k] = v[k] != 0;
}
template <typename T> FN void store(T* p, F v) {
  for (int k = 0; k < W; k++) p[k] = (T)v[k];
}
PART store_rows(bool* p, int64_t stride, int64_t n, B v) {
  for (int k = 0; k < W && k < n; k++) p[k * stride] = v[k] != 0;
}
template <typename T> PART store_rows(T* p, int64_t stride, int64_t n, F v) {
  for (int k = 0; k < W && k < n; k++) p[k * stride] = (T)v[k];
}
// Blocks of as many lanes and rows are turned, so that a row's numbers are written together.
template <int... K> struct Row {};
template <int N, int... K> struct Upto : Upto<N - 1, N - 1, K...> {};
template <int... K> struct Upto<0, K...> { typedef Row<K...> row; };
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, B{__VA_ARGS__})
#endif
template <int N, int S, int... K> FN void exchange(F* v, Row<K...>) {
#pragma GCC unroll 16
  for (int j = 0; j < N; j++) {
    if (j & S) continue;
    const F a = v[j], b = v[j + S];
    v[j] = SHUFFLE(a, b, (K & S ? W + K - S : K)...);
    v[j + S] = SHUFFLE(a, b, (K & S ? W + K : K + S)...);
  }
}
template <int N, int S = 1> FN void transpose(F* v) {
  exchange<N, S>(v, typename Upto<W>::row());
  if constexpr (2 * S < N) transpose<N, 2 * S>(v);
}
template <int N> PART store_lanes(float* p, int64_t stride, int64_t n, const F* v) {
  constexpr int M = N > 8 ? 16 : N > 4 ? 8 : 4;
  F block[M];
#pragma GCC unroll 16
  for (int j = 0; j < M; j++) block[j] = j < N ? v[j] : F{};
  transpose<M>(block);
  for (int k = 0; k < W && k < n; k++) __builtin_memcpy(p + k * stride, (float*)(block + k % M) + k / M * M, 4 * N);
}
template <int N> FN void store_rows(float* p, int64_t stride, int64_t n, const F* v) {
  if constexpr (N > W) {
    store_lanes<W>(p, stride, n, v);
    store_rows<N - W>(p + W, stride, n, v + W);
  } else if constexpr (N > 3) {
    store_lanes<N>(p, stride, n, v);
  } else {
    for (int j = 0; j < N; j++) store_rows(p + j, stride, n, v[j]);
  }
}
// a lane of an input; all rows read the same one
FN F load_lane(const float* p, F lane, int64_t n_padded, int64_t i) {
  return load(p + (int64_t)lane[0] * n_padded + i);
}
// the number at a place of a table, for each row
FN F take(const F* table, int length, F place) {
  F v;
  for (int k = 0; k < W; k++) v[k] = table[place[k] >= 0 && place[k] < length ? (int)place[k] : 0][k];
  return v;
}
FN void put(F* table, int length, F place, F value) {
  for (int k = 0; k < W; k++)
    if (place[k] >= 0 && place[k] < length) table[(int)place[k]][k] = value[k];
}
// PyTorch's libraries hold the functions that its own operations call
#ifdef LIBRARY
#define INSTRUCTION(name, code) \
  FN F name##_of(F a) { \
    asm(code " %1, %0" : "=v"(a) : "v"(a)); \
    return a; \
  }
#define FUNCTION(name, precision) \
  extern "C" F LIBRARY(name, precision)(F); \
  FN F name##_of(F a) { return LIBRARY(name, precision)(a); }
#define FUNCTION_OF_TWO(name, precision) \
  extern "C" F LIBRARY(name, precision)(F, F); \
  FN F name##_of(F a, F b) { return LIBRARY(name, precision)(a, b); }
FN F fmadd(F a, F b, F c) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
}
FN F fmadd(F a, const float& b, F c) {
#ifdef CPU_CAPABILITY_AVX512
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(a), "m"(b));
  return c;
#else
  return fmadd(a, F(b), c);
#endif
}
#else
#define INSTRUCTION(name, code) FUNCTION(name, )
#define FUNCTION(name, precision) \
  FN F name##_of(F a) { \
    for (int k = 0; k < W; k++) a[k] = __builtin_##name##f(a[k]); \
    return a; \
  }
#define FUNCTION_OF_TWO(name, precision) \
  FN F name##_of(F a, F b) { \
    for (int k = 0; k < W; k++) a[k] = __builtin_##name##f(a[k], b[k]); \
    return a; \
  }
FN F fmadd(F a, F b, F c) { return a * b + c; }
FN F fmadd(F a, float b, F c) { return a * F(b) + c; }
#endif
INSTRUCTION(sqrt, "vsqrtps")
INSTRUCTION(floor, ROUND " $9,")
INSTRUCTION(trunc, ROUND " $11,")
FUNCTION(sin, _u35)
FUNCTION(cos, _u35)
FUNCTION(tan, _u10)
FUNCTION(exp, _u10)
FUNCTION(log, _u10)
FUNCTION(log1p, _u10)
FUNCTION(expm1, _u10)
FUNCTION(atanh, _u10)
FUNCTION_OF_TWO(atan2, _u10)
FUNCTION_OF_TWO(pow, _u10)
FUNCTION_OF_TWO(fmod, )
// y = x w for W rows at once: y[j] is the sum over k of x[k] w[k * SK + j * SN]
template <int K, int SK, int SN, int N> FN void some_columns(const F* x, const float* w, F* y) {
  F sums[N];
#pragma GCC unroll 16
  for (int j = 0; j < N; j++) sums[j] = F{};
  for (int k = 0; k < K; k++) {
    const F each = x[k];
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) sums[j] = fmadd(each, w[k * SK + j * SN], sums[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < N; j++) y[j] = sums[j];
}
template <int K, int SK, int SN, int N>
static __attribute__((noinline)) void linear(const F* x, const float* w, F* y) {
  int j = 0;
  for (; j + W <= N; j += W) some_columns<K, SK, SN, W>(x, w + j * SN, y + j);
  if constexpr (N % W) some_columns<K, SK, SN, N % W>(x, w + j * SN, y + j);
}
// one of 16 numbers, for each row
FN F entry(const float* table, B place) {
  F found;
#ifdef LIBRARY
  asm("vpermps %2, %1, %0" : "=v"(found) : "v"(place), "v"(load(table)));
  if constexpr (W == 8) {
    const F first = found;
    asm("vpermps %2, %1, %0" : "=v"(found) : "v"(place), "v"(load(table + 8)));
    found = where((place & 8) != 0, found, first);
  }
#else
  for (int k = 0; k < W; k++) found[k] = table[place[k] & 15];
#endif
  return found;
}
// Polynomials of tanh in a - c, the best for their intervals: c, and the coefficients from the constant one on. The
// first three bits of |a| + 0.75 and those of its exponent say which. The largest relative error is 6e-8.
alignas(64) static const float TANH[7][16] = {
    {1.496521f, 2.00250244f, 2.49572754f, 3.00177002f, 3.74798584f, 4.75750732f, 5.75280762f, 6.75f, 8.11730957f, 0,
     0, 0.188476562f, 0.374694824f, 0.624816895f, 0.876403809f, 1.12438965f},
    {0.904517651f, 0.964203954f, 0.986500204f, 0.995072186f, 0.998889923f, 0.999852538f, 0.999979854f, 0.999997258f,
     0.999999821f, 1, 0, 0.186276048f, 0.358091384f, 0.554472923f, 0.704613149f, 0.809090376f},
    {0.181847796f, 0.0703107119f, 0.0268173385f, 0.00983135123f, 0.00221886765f, 0.000294920406f, 4.02945843e-05f,
     5.48403159e-06f, 3.56229606e-07f, 0, 1, 0.965301216f, 0.87177068f, 0.692559838f, 0.50352031f, 0.345372766f},
    {-0.164500624f, -0.0677936375f, -0.0264537502f, -0.00978207868f, -0.00221291091f, -0.000294388243f,
     -4.02271871e-05f, -5.47499985e-06f, -3.50113282e-07f, 0, 3.11896969e-07f, -0.179811999f, -0.312164098f,
     -0.384002358f, -0.35478881f, -0.279440314f},
    {0.0881758258f, 0.0419328548f, 0.0171598103f, 0.00645691156f, 0.00147258234f, 0.000196076304f, 2.68132717e-05f,
     3.65054393e-06f, 2.35255854e-07f, 0, -0.333355635f, -0.288276166f, -0.178831697f, -0.0179453716f, 0.0821474418f,
     0.110967055f},
    {-0.0242371578f, -0.0178437531f, -0.00817618053f, -0.0031996984f, -0.000770227343f, -0.000103184801f,
     -1.41141327e-05f, -1.92121092e-06f, -1.38390845e-07f, 0, 0.000472508749f, 0.113291115f, 0.166466385f,
     0.137383163f, 0.0606883913f, 0.00379861076f},
    {-0.00320012425f, 0.0047018826f, 0.00286748656f, 0.00123015291f, 0.000303074572f, 4.17456431e-05f,
     5.66307654e-06f, 7.6665998e-07f, 5.30958992e-08f, 0, 0.129987478f, 0.0971129462f, 0.0204074215f, -0.0539799631f,
     -0.0585770495f, -0.0321104564f},
};
FN F tanh_of(F a) {
  const F size = abs_of(a), x = where(F(9.02f) < size, F(9.02f), size);
  const B place = (B)(x + 0.75f) >> 21;
  const F d = x - entry(TANH[0], place);
  F p = entry(TANH[6], place);
#pragma GCC unroll 8
  for (int k = 5; k > 0; k--) p = fmadd(p, d, entry(TANH[k], place));
  return (F)((B)p | ((B)a & INT32_MIN));
}
"""
HEAD += DERIVED
"""What the code of functions needs before it."""
_PARAMETERS = (
    "int64_t i, int64_t n, int64_t P, const void* const* in, void* const* out, const int64_t* S, "
    "F* kept, float* held, F* scratch, B& fail, const B* any, B* hit, B valid"
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
        that matters to a row: each depends on earlier ones only, so this ends. Where such a guess would be in vain, the
        loop ends, and another one goes on.
    """
    code = write(statements, inputs, stores, guards, _PARAMETERS)
    stages = [f"stage{number}" for number in range(len(code.n_any))]
    return f"""{code.functions}
extern "C" int run(int64_t n, int64_t P, const void* const* in, void* const* out, const int64_t* S) {{
  constexpr int N_STAGES = {len(stages)}, N_ANY = {code.n_any[-1]}, N_HELD = {code.n_held};
  constexpr int ENDS[] = {{{", ".join(map(str, code.n_any))}}};
  constexpr decltype(&stage0) STAGES[] = {{{", ".join(stages)}}};
  static bool last[N_ANY + 1];
  F kept[{code.n_kept + 1}], scratch[{code.n_scratch + 1}];
  B any[N_ANY + 1], hit[2 * N_ANY + 1], wrong = FALSE, rows;
  float* const held = N_HELD ? (float*)__builtin_malloc(sizeof(float) * N_HELD * P) : nullptr;
  if (N_HELD && !held) return 0;
  for (int k = 0; k < W; k++) rows[k] = k;
  for (int k = 0; k < N_ANY; k++) any[k] = __atomic_load_n(last + k, __ATOMIC_RELAXED) ? TRUE : FALSE;
  for (auto& each : hit) each = FALSE;
  for (int stage = 0, first = 0; stage < N_STAGES; first = ENDS[stage++]) {{
    B wrong_here;
    for (bool again = true; again;) {{
      wrong_here = FALSE;
      for (int64_t i = 0; i < n; i += W) {{
        const B valid = i + W <= n ? TRUE : rows < (int32_t)(n - i);
        B fail = FALSE;
        STAGES[stage]({code.arguments});
        wrong_here |= fail & valid;
      }}
      again = false;
      for (int k = first; k < ENDS[stage]; k++) {{
        const bool found = !none(hit[2 * k]), is_used = stage == N_STAGES - 1 || k < ENDS[stage] - 1;
        again = again || (is_used && found == none(any[k]) && !none(hit[2 * k + 1]));
        any[k] = found ? TRUE : FALSE;
        hit[2 * k] = hit[2 * k + 1] = FALSE;
        __atomic_store_n(last + k, found, __ATOMIC_RELAXED);
      }}
    }}
    wrong |= wrong_here;
  }}
  __builtin_free(held);
  const bool holds = none(wrong);
#ifdef __AVX__
  __builtin_ia32_vzeroupper();  // compilers forget it here, and PyTorch's tanh would then take three times as long
#endif
  return holds;
}}
"""
