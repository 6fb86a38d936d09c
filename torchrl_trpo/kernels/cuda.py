"""Statements for one row as a CUDA kernel, a thread for each row of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils import cpp_extension

from torchrl_trpo.kernels.compiler import CompilerError
from torchrl_trpo.kernels.lanes import Statement, Unsupported
from torchrl_trpo.kernels.terms import DERIVED, FUNCTIONS, FUNCTIONS_OF_TWO
from torchrl_trpo.kernels.writer import Guard, Store, write

_ROWS_OF_A_BLOCK = 64
_HEAD = r"""
typedef unsigned char uint8_t;
typedef int int32_t;
typedef long long int64_t;
typedef float F;
typedef bool B;
#define FN __device__ inline
#define PART static __device__ __noinline__ void
#define TRUE true
#define FALSE false
#define shared load
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)
template <typename T> FN T where(B condition, T value, T other) { return condition ? value : other; }
template <typename T> FN T only(T v, B) { return v; }
FN F minimum(F a, F b) { return a != a || a < b ? a : b; }
FN F maximum(F a, F b) { return a != a || a > b ? a : b; }
FN F neg_of(F a) { return -a; }
FN F abs_of(F a) { return fabsf(a); }
FN F tanh_of(F a) { return tanhf(a); }
FN B load(const uint8_t* p) { return *p != 0; }
template <typename T> FN F load(const T* p) { return (F)*p; }
FN F take(const F* table, int length, F place) { return table[place >= 0 && place < length ? (int)place : 0]; }
FN void put(F* table, int length, F place, F value) {
  if (place >= 0 && place < length) table[(int)place] = value;
}
template <typename T, typename N> FN void store(T* p, N v) { *p = (T)v; }
"""
_HEAD += "".join(f"FN F {name}_of(F a) {{ return {name}f(a); }}\n" for name in FUNCTIONS)
_HEAD += "".join(f"FN F {name}_of(F a, F b) {{ return {name}f(a, b); }}\n" for name in FUNCTIONS_OF_TWO) + DERIVED
_PARAMETERS = (
    "int64_t i, int64_t P, void* const* in, void* const* out, "
    "F* kept, F* scratch, B& fail, const int64_t* any, B* hit, B valid"
)


class Kernel:
    """A function of rows on a GPU.

    The kernel is started on the current stream of the device. A call waits for it once, to learn whether the guards
    hold. What any row of the batch has is taken to be as in the last call; if it is not, the kernel runs again.

    Args:
        device: the device.
        statements: the statements.
        inputs: by the names of the inputs, the number of the input buffer and the row where they begin.
        stores: what is written.
        guards: what must hold.

    Raises:
        Unsupported: if there are statements of networks, results that are written as rows, or random numbers that are
            drawn under conditions.
        CompilerError: if PyTorch cannot compile kernels for the device.
    """

    def __init__(
        self,
        device: torch.device,
        statements: Sequence[Statement],
        inputs: Mapping[str, tuple[int, int]],
        stores: Sequence[Store],
        guards: Sequence[Guard],
    ) -> None:
        code = write(statements, inputs, stores, guards, _PARAMETERS)
        if code.operations & {"linear", "map"} or any(store.by_row for store in stores):
            raise Unsupported("networks and results that are written as rows are for the CPU")
        if "drawn_if" in code.operations:  # a GPU draws k tensors at once otherwise than one after the other
            raise Unsupported("random numbers that are drawn under conditions are for the CPU")
        self._device = device
        (n_any,) = code.n_any  # there is one stage
        self._any = np.zeros(n_any, np.int64)
        self._launch = load(
            f"""{_HEAD}
{code.functions}
// what a call reads and writes: the addresses, what is taken to be so of any row, what is found, and what is wrong
extern "C" __global__ void run(int n, int P, int n_in, int n_out, void** table) {{
  constexpr int N_ANY = {n_any};
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  void** const in = table;
  void** const out = in + n_in;
  int64_t* const any = (int64_t*)(out + n_out);
  int64_t* const found = any + N_ANY;
  F kept[{code.n_kept + 1}], scratch[{code.n_scratch + 1}];
  B fail = false, hit[2 * N_ANY + 1] = {{}};
  const B valid = true;
  stage0({code.arguments});
  for (int k = 0; k < 2 * N_ANY; k++)
    if (hit[k]) found[k] = 1;
  if (fail) found[2 * N_ANY] = 1;
}}
""",
            device,
        )

    def __call__(self, n: int, padded: int, inputs: np.ndarray, outputs: np.ndarray) -> bool:
        """Calls the function.

        Args:
            n: the number of rows.
            padded: the number of rows that the buffers have room for.
            inputs: the addresses of the input buffers, uint64.
            outputs: the addresses of the output buffers, uint64.

        Returns:
            Whether the guards hold.
        """
        addresses = np.concatenate([inputs, outputs]).view(np.int64)
        while True:
            table = np.concatenate([addresses, self._any, np.zeros(2 * len(self._any) + 1, np.int64)])
            on_device = torch.from_numpy(table).to(self._device, non_blocking=True)
            sizes = [n, padded, len(inputs), len(outputs)]
            self._launch(math.ceil(n / _ROWS_OF_A_BLOCK), [*sizes, on_device])
            *hits, wrong = on_device[len(addresses) + len(self._any) :].tolist()  # the one wait
            found, matters = np.array(hits[::2], np.int64), np.array(hits[1::2], bool)
            if not (matters & (found != self._any)).any():
                return not wrong
            self._any[:] = found


def load(code: str, device: torch.device) -> Callable[[int, Sequence[int | Tensor]], None]:
    """Compiles a kernel ``run``.

    Args:
        code: the code.
        device: the device.

    Returns:
        What starts it, of the number of blocks and the arguments: 32-bit numbers, and tensors on the device.

    Raises:
        CompilerError: if PyTorch cannot compile it.
    """
    if device.type != "cuda":
        raise CompilerError(f"there are no kernels for {device}")
    try:
        # PyTorch's way to NVRTC, which is private. It wants to know where CUDA's headers are, which are not needed.
        headers = mock.patch.object(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME or "")
        with torch.cuda.device(device), headers:
            kernel: Any = torch.cuda._compile_kernel(code, "run", nvcc_options=["-fmad=false"])
    except (AttributeError, OSError, RuntimeError) as error:
        raise CompilerError(f"PyTorch {torch.__version__} does not compile kernels: {str(error)[:500]}") from error

    def launch(n_blocks: int, arguments: Sequence[int | Tensor]) -> None:
        with torch.cuda.device(device):
            kernel((n_blocks, 1, 1), (_ROWS_OF_A_BLOCK, 1, 1), list(arguments))

    return launch
