"""Steps of a rollout that compiled functions take by themselves, one after the other in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_trpo.envs.rollout_functions import RolloutFunctions
from torchrl_trpo.kernels.buffers import DRAWN_IF, Columns, DrawsOfSteps
from torchrl_trpo.kernels.compiler import Call, Function
from torchrl_trpo.kernels.lanes import DTYPES

_MOST_DRAWN = 1 << 17  # random numbers that are drawn beforehand
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Kind(ctypes.Structure):
    """The numbers of one kind: the bytes of each, the lanes of the state, those that a reset writes, and its rows."""

    _fields_ = (("size", _INT), ("n_lanes", _INT), ("n_reset", _INT), ("reset", _POINTER), ("fresh", _POINTER))


class _Plan(ctypes.Structure):
    """What the steps read and write: see the code below, which has the same."""

    _fields_ = (
        *((name, _INT) for name in ("n", "padded", "n_kinds", "n_carried", "n_stored")),
        *((name, _INT) for name in ("n_draws", "first_draw", "done", "n_fresh")),
        *((name, Call) for name in ("act", "step", "finish", "read", "reset_some", "reset_all")),
        ("read_changes_state", _INT),
        *((name, _POINTER) for name in ("kinds", "states", "carried", "draws", "stored", "stored_bytes")),
        *((name, _INT) for name in ("state", "now", "next")),
    )


_CODE = r"""
typedef int Run(int64_t, int64_t, const void* const*, void* const*, const int64_t*);
struct Call { Run* run; const void** in; void** out; const int64_t* strides; };
struct Kind { int64_t size, n_lanes, n_reset; const int64_t* reset; const char* fresh; };
struct Plan {
  int64_t n, P, n_kinds, n_carried, n_stored, n_draws, first_draw, done, n_fresh;
  Call act, step, finish, read, reset_some, reset_all;
  int64_t read_changes_state;
  const Kind* kinds;
  char* const* states;         // [4, n_kinds]: the first one is only read, the last one is for the read
  char* const* carried;        // [3, n_carried]
  char* const* draws;          // [n_steps + 1, n_draws]: behind those of the steps, the policy's own
  char* const* stored;         // [n_stored], at the first step
  const int64_t* stored_bytes; // [n_stored], from step to step
  int64_t state, now, next;    // where things are: the state, what is carried, the pool's next environment
};
static bool call(const Plan& p, const Call& c) { return c.run(p.n, p.P, c.in, c.out, c.strides); }
template <typename To> static void set(To* to, char* const* from, int64_t n) {
  for (int64_t k = 0; k < n; k++) to[k] = from[k];
}
static void copy(char* to, const char* from, int64_t size) {
  if (size == 1) *to = *from;
  else if (size == 4) __builtin_memcpy(to, from, 4);
  else __builtin_memcpy(to, from, 8);
}
// A whole step from `before`, or nothing that counts: what was there stays.
static bool one(Plan& p, int64_t t) {
  const int64_t K = p.n_kinds, C = p.n_carried;
  int64_t state = p.state == 1 ? 2 : 1, now = (p.now + 1) % 3, next = p.next;
  char* const* before = p.carried + p.now * C;
  set(p.act.in, before, C);
  set(p.act.in + p.first_draw, p.draws + t * p.n_draws, p.n_draws);
  if (!call(p, p.act)) return false;
  set(p.step.in, p.states + p.state * K, K);
  set(p.step.out, p.states + state * K, K);
  if (!call(p, p.step)) return false;
  set(p.finish.in, before, C);
  for (int64_t k = 0; k < p.n_stored; k++) p.finish.out[k] = p.stored[k] + t * p.stored_bytes[k];
  set(p.finish.out + p.n_stored, p.carried + now * C, C);
  if (!call(p, p.finish)) return false;
  const char* done = p.carried[now * C + p.done];
  int64_t n_done = 0;
  for (int64_t row = 0; row < p.n; row++) n_done += done[row];
  if (n_done) {
    if (next + n_done > p.n_fresh) return false;
    char* const* buffers = p.states + state * K;
    for (int64_t row = 0; row < p.n; row++) {
      if (!done[row]) continue;
      for (int64_t k = 0; k < K; k++) {
        const Kind& kind = p.kinds[k];
        const char* fresh = kind.fresh + next * kind.n_reset * kind.size;
        for (int64_t l = 0; l < kind.n_reset; l++)
          copy(buffers[k] + (kind.reset[l] * p.P + row) * kind.size, fresh + l * kind.size, kind.size);
      }
      next++;
    }
    char* const* after = p.states + 3 * K;
    set(p.read.in, buffers, K);
    set(p.read.out, after, K);
    if (!call(p, p.read)) return false;
    for (int64_t k = 0; p.read_changes_state && k < K; k++)
      for (int64_t l = 0; l < p.kinds[k].n_lanes; l++)
        for (int64_t row = 0; row < p.n; row++) {
          const int64_t place = (l * p.P + row) * p.kinds[k].size;
          if (done[row]) copy(buffers[k] + place, after[k] + place, p.kinds[k].size);
        }
    const Call& reset = n_done == p.n ? p.reset_all : p.reset_some;
    set(reset.in, p.carried + now * C, C);
    reset.in[C] = done;
    now = (p.now + 2) % 3;
    set(reset.out, p.carried + now * C, C);
    if (!call(p, reset)) return false;
  }
  p.state = state, p.now = now, p.next = next;
  return true;
}
extern "C" int run(int64_t n_steps, int64_t, const void*, void* plan, const int64_t*) {
  int64_t t = 0;
  Plan& p = *(Plan*)plan;
  while (t < n_steps && one(p, t)) t++;
  set(p.act.in + p.first_draw, p.draws + n_steps * p.n_draws, p.n_draws);
  return t;
}
"""


class ManySteps:
    """Takes steps of a rollout without Python.

    It stops before a step in which something else than compiled functions has a part: a function that does not stand
    for the simulator's, or a reset when no environment waits in the pool any more.

    Args:
        functions: the functions of the rollout, whose policy is compiled.
        columns: three of what a step leaves to the next. The first one has what the next step begins with.
        done: the number of the done flags among their tensors.

    Attributes:
        most: how many steps a call may take.
    """

    def __init__(self, functions: RolloutFunctions, columns: list[Columns], done: int) -> None:
        self._functions, self._columns, self._done = functions, columns, done
        self._run = Function(_CODE)
        others, draws = (functions.finish_step, *functions.finish_reset.values()), functions.act.draws
        self._is_possible = not any(function.draws.size for function in others)
        self._is_possible &= all(method != DRAWN_IF for _, method, _ in draws.methods)
        self._draws: DrawsOfSteps | None = None
        self.most = max(1, _MOST_DRAWN // max(1, draws.size))

    def take(
        self,
        n_steps: int,
        env: Any,
        calls: tuple[Call | None, Call | None],
        states: Sequence[Mapping[str, Tensor]],
        stored: tuple[np.ndarray, np.ndarray],
    ) -> tuple[int, int]:
        """Takes steps.

        Args:
            n_steps: how many at most, :attr:`most` or less.
            env: the ``CompiledVmasEnv``.
            calls: its step, and what reads its entries after a reset.
            states: the buffers of the state, and three others that may be written.
            stored: where the data of the first step is written, and how many bytes farther that of the next.

        Returns:
            How many steps it has taken, and which of ``states`` is the state now. ``columns`` are in another order: the
            first one has what the next step begins with.
        """
        step, read = calls
        if step is None or not self._is_possible:
            return 0, 0
        n_fresh, fresh = (0, {}) if read is None else env.pool.waiting()
        act, finish, resets = self._functions.act, self._functions.finish_step, self._functions.finish_reset
        kinds = (_Kind * len(DTYPES))()
        for kind, (name, buffer) in zip(kinds, states[0].items(), strict=True):
            kind.size, kind.n_lanes = buffer.element_size(), len(buffer)
            if n_fresh and name in fresh:
                lanes, rows = fresh[name]
                kind.n_reset, kind.reset, kind.fresh = len(lanes), lanes.data_ptr(), rows.data_ptr()
        if self._draws is None or len(self._draws.addresses) < n_steps:
            self._draws = DrawsOfSteps(env.state.layout, act.draws, n_steps)
        generator = torch.get_rng_state()
        self._draws.draw(n_steps)
        tables = {  # contiguous, as C++ reads them
            "states": np.array([[buffer.data_ptr() for buffer in each.values()] for each in states], np.uint64),
            "carried": np.stack([each.addresses for each in self._columns]),
            "draws": np.vstack([self._draws.addresses[:n_steps], act.draws.addresses]),
            "stored": stored[0],
            "stored_bytes": stored[1],
        }
        plan = _Plan(
            n=env.state.layout.n,
            padded=env.state.layout.padded,
            n_kinds=len(kinds),
            n_carried=len(self._columns[0].tensors),
            n_stored=len(stored[0]),
            n_draws=len(act.draws.addresses),
            first_draw=len(act.inputs),
            done=self._done,
            n_fresh=n_fresh,
            act=act.call(),
            step=step,
            finish=finish.call(),
            read_changes_state=bool(n_fresh) and env.compiled_read.changes_state,
            kinds=ctypes.addressof(kinds),
            **{name: table.ctypes.data for name, table in tables.items()},
        )
        if n_fresh:
            plan.read, plan.reset_all = read, resets[True].call()
            plan.reset_some = resets.get(False, resets[True]).call()
        n_taken = self._run(n_steps, 0, 0, ctypes.addressof(plan), 0)
        if n_taken < n_steps:  # the others draw again
            torch.set_rng_state(generator)
            self._draws.draw(n_taken)
        if n_fresh:
            env.pool.taken(plan.next)
        self._columns[:] = [self._columns[(plan.now + number) % 3] for number in range(3)]
        return n_taken, plan.state
