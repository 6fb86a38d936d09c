"""Rollouts of a policy in compiled VMAS, with nothing but compiled functions at each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchrl.envs import EnvBase
from torchrl.envs.utils import exploration_type
from torchrl.modules import TanhNormal

from torchrl_trpo.distributions import BoundedTanhNormal
from torchrl_trpo.envs.compiled import CompiledFunction, check_equal
from torchrl_trpo.envs.compiled_vmas import CompiledVmasEnv
from torchrl_trpo.envs.many_steps import ManySteps
from torchrl_trpo.envs.reads import Untraceable
from torchrl_trpo.envs.rollout_functions import RolloutFunctions, some_and_all
from torchrl_trpo.envs.torchrl_step import Policy, base_of, filled, left_as_they_are, parameters_of, settings_of
from torchrl_trpo.envs.tracing import first_with, left_as_it_is
from torchrl_trpo.kernels.buffers import Columns, NotCompiled
from torchrl_trpo.kernels.lanes import Unsupported
from torchrl_trpo.seeding import untouched_generators


class FusedRollout:
    """A policy in compiled VMAS: the policy, TorchRL's transforms and resets are compiled as the simulator is.

    A step is three compiled functions: the policy with the actions' way through the inverse transforms; the simulator's
    step; and what TorchRL makes of its entries. Where episodes end, another one is what TorchRL makes of a reset. As
    long as nothing else is needed, steps are taken one after the other in one call. What a compiled function cannot do
    at some step, TorchRL and VMAS do.

    Args:
        env: a :class:`~torchrl_trpo.envs.CompiledVmasEnv`, or a ``TransformedEnv`` of one.
        policy: the policy, compiled if it can be.
        data: the data that the policy acts on next.

    Attributes:
        why_policy_not_compiled: why the policy is called at each step; None if it is compiled.

    Raises:
        NotCompiled: if the environment is another one, or TorchRL's part cannot be compiled, with the reason.
    """

    def __init__(self, env: EnvBase, policy: Policy, data: TensorDictBase) -> None:
        self._env, self._policy = env, policy
        self._base: Any = base_of(env)
        if not isinstance(self._base, CompiledVmasEnv):
            raise NotCompiled(f"the environment is a {type(self._base).__name__}, and no CompiledVmasEnv")
        if self._base.compiled_step is None:
            raise NotCompiled(f"its simulator is not compiled: {self._base.why_not_compiled}")
        try:
            with torch.no_grad(), untouched_generators(), left_as_they_are(env, policy):
                _check_bounds_once(policy)
                self._functions = RolloutFunctions(env, policy, data)
                self._make_room()
                self._data = data.select(*self._keys)
                self._compare()
            self._settings = self._find_settings()
        except (Untraceable, Unsupported) as error:
            raise NotCompiled(str(error)) from error

    def _make_room(self) -> None:
        functions, n = self._functions, self._base.state.layout.n
        self.why_policy_not_compiled = functions.why_policy_not_compiled
        self._torchrl = functions.torchrl
        self._keys = self._torchrl.carried_keys  # of what a step leaves to the next
        self._done = self._keys.index("done")
        self._columns = [Columns.like(n, functions.carried) for _ in range(3)]  # carried, following, and room
        self._chosen, self._actions = Columns.like(n, functions.chosen), Columns.like(n, functions.actions)
        self._many_steps: ManySteps | None = None
        self._n_asked = 1 << 62  # of it at a time: fewer after it has stopped early
        if self.why_policy_not_compiled is None:
            self._many_steps = ManySteps(functions, self._columns, self._done)
            functions.act.outputs[:] = [*self._chosen.addresses, *self._actions.addresses]
        else:
            functions.act.outputs[:] = self._actions.addresses
            functions.act.inputs[len(self._keys) :][: len(functions.chosen)] = self._chosen.addresses
        self._step: Any = None
        self._follow_variant()

    @property
    def _carried(self) -> Columns:
        """What a step has left to the next."""
        return self._columns[0]

    @property
    def _following(self) -> Columns:
        """Room for what it leaves."""
        return self._columns[1]

    def _carry_on(self) -> None:
        self._columns[:2] = self._columns[1], self._columns[0]

    def _follow_variant(self) -> None:
        """Takes over the simulator's functions, if it has others than at the last call."""
        base, functions, n_carried = self._base, self._functions, len(self._keys)
        if base.compiled_step is self._step:
            return
        self._step, self._state = base.compiled_step, base.state
        self._spares: list[dict[str, Tensor]] = []  # buffers that nothing reads
        self._entries = Columns(self._step.results, self._step.slots)
        inputs = [*self._chosen.addresses, *self._entries.addresses]
        functions.finish_step.inputs[n_carried : n_carried + len(inputs)] = inputs
        if base.compiled_read is not None:
            self._reset_entries = Columns(base.compiled_read.results, base.compiled_read.slots)
            inputs = list(self._reset_entries.addresses)
            for function in functions.finish_reset.values():
                function.inputs[n_carried + 1 : n_carried + 1 + len(inputs)] = inputs

    def _find_settings(self) -> list[Any]:
        parameters = parameters_of(self._env, self._policy).values()
        shapes = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.storage_offset()) for tensor in parameters]
        shared = first_with(tensor.untyped_storage().data_ptr() for tensor in parameters)
        is_called = self.why_policy_not_compiled is not None  # then its settings are its own affair
        of_policy = None if is_called else settings_of(self._policy)
        return [exploration_type(), shapes, shared, settings_of(self._env), of_policy]

    def is_current(self, policy: Policy) -> bool:
        """Whether policy and environment are what they were when they were compiled, apart from their numbers."""
        try:
            return policy is self._policy and self._find_settings() == self._settings
        except NotCompiled:  # parameters are where they cannot be read
            return False

    @torch.no_grad()
    def collect(self, data: TensorDictBase, batch: TensorDictBase) -> TensorDictBase:
        """Collects a batch.

        Args:
            data: the data that the policy acts on first, ``[n]``.
            batch: the batch that is written, ``[n, T]``.

        Returns:
            The data that the policy acts on next.
        """
        self._begin(data)
        rows = [batch.get(key) for key in self._functions.stored_keys]
        first = np.array([tensor.data_ptr() for tensor in rows], np.uint64)
        step = np.array([tensor.stride(1) * tensor.element_size() for tensor in rows], np.uint64)
        places = first + step * np.arange(batch.shape[1], dtype=np.uint64)[:, None]
        self._functions.finish_step.strides[: len(rows)] = [tensor.stride(0) for tensor in rows]
        try:
            time = 0
            while (time := time + self._take_steps(places[time:], step)) < len(places):
                self._functions.finish_step.outputs[: len(rows)] = places[time]
                self._choose_actions()
                self._simulate()
                self._finish_data(rows, time)
                ended = self._carried.tensors[self._done]
                if ended.any():
                    self._reset_ended(ended)
                time += 1
        finally:
            self._hold()
        return self._carried_in(data)

    def _take_steps(self, places: np.ndarray, step: np.ndarray) -> int:
        """Takes the steps that compiled functions can take by themselves, until one needs more.

        Args:
            places: where the data of each step is written.
            step: how many bytes farther that of the next is.

        Returns:
            How many it has taken.
        """
        base, state, many, time = self._base, self._state, self._many_steps, 0
        has_resets = base.compiled_read is not None and self._functions.finish_reset
        while many is not None and self._is_attached and time < len(places):
            read = base.compiled_read.call((), self._reset_entries, of_rows=True) if has_resets else None
            move = self._step.call(self._actions.addresses, self._entries) if self._step.changes_state else None
            states = [state.buffers, *(self._spare() for _ in range(3))]
            n_asked = min(len(places) - time, self._n_asked, many.most)
            n_taken, now = many.take(n_asked, base, (move, read), states, (places[time], step))
            if now:
                state.move(states[now])
            unused = (each for number, each in enumerate(states) if number != now)
            self._spares += [each for each in unused if each is not self._held]
            time += n_taken
            if n_taken < n_asked:
                self._n_asked = 2 * n_taken + 1
                break
            self._n_asked = max(self._n_asked, 2 * n_asked)
        return time

    def _spare(self) -> dict[str, Tensor]:
        """Buffers of the state that nothing reads."""
        return self._spares.pop() if self._spares else self._state.layout.empty()

    def _hold(self) -> None:
        """Makes the simulator's objects hold the state."""
        if self._is_attached:
            self._held: dict[str, Tensor] = self._state.buffers
            self._state.hold(self._held)

    def _begin(self, data: TensorDictBase) -> None:
        self._carried.put([data.get(key) for key in self._keys])
        parameters = [tensor.data_ptr() for tensor in parameters_of(self._env, self._policy).values()]
        functions = self._functions
        for function in (functions.act, functions.finish_step, *functions.finish_reset.values()):
            function.inputs[len(function.inputs) - len(parameters) :] = parameters
        self._follow_variant()
        self._is_attached = self._state.attach()
        self._held = self._state.buffers

    def _choose_actions(self) -> None:
        if self.why_policy_not_compiled is not None:
            data = self._carried_in(self._data)
            acted = self._by_vmas(lambda: self._policy(data))  # it may look at the simulator's objects, and change them
            self._chosen.put([acted.get(key) for key in self._torchrl.chosen_keys])
        self._functions.act.inputs[: len(self._keys)] = self._carried.addresses
        if not self._functions.act():  # a whole number is too large for compiled code
            chosen, actions = self._choose_by_torchrl(self._carried.tensors)
            self._chosen.put(chosen)
            self._actions.put(actions)

    def _choose_by_torchrl(self, carried: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What the policy chooses, or has chosen if it is called, and what the simulator's actions are."""
        is_called = self.why_policy_not_compiled is not None
        leaves = [*carried, *(self._chosen.tensors if is_called else ())]
        policy = None if is_called else self._policy
        return self._torchrl.choose(self._env, self._data, [leaf.clone() for leaf in leaves], policy)

    def _carried_in(self, data: TensorDictBase) -> TensorDictBase:
        """Data with what the last step has left."""
        return filled(data, self._keys, [tensor.clone() for tensor in self._carried.tensors])

    def _simulate(self) -> None:
        if not (self._is_attached and self._run(self._step, self._actions.addresses, self._entries)):
            actions = [action.clone() for action in self._actions.tensors]
            entries = self._by_vmas(lambda: self._base._take_step(actions))
            self._entries.put(tree_leaves(entries))  # another variant has other entries

    def _finish_data(self, rows: Sequence[Tensor], time: int) -> None:
        """Writes the data of the step, ``rows`` ``[n, T, ...]`` at a time, and what the next step has."""
        finish = self._functions.finish_step
        finish.inputs[: len(self._keys)] = self._carried.addresses
        finish.outputs[len(rows) :] = self._following.addresses
        if not finish():
            leaves = [*self._carried.tensors, *self._chosen.tensors, *self._entries.tensors]
            stored, following = self._torchrl.finish(self._env, self._data, [leaf.clone() for leaf in leaves])
            for row, value in zip(rows, stored.values(), strict=True):
                row[:, time] = value
            self._following.put(following)
        self._carry_on()

    def _reset_ended(self, ended: Tensor) -> None:
        base, rows = self._base, ended.squeeze(-1)
        is_compiled = self._functions.finish_reset and base.compiled_read is not None and self._is_attached
        if not is_compiled or not base.pool.put(rows):
            data = self._carried_in(self._data).set("_reset", ended.clone())
            data = self._by_vmas(lambda: self._env.reset(data, select_reset_only=True))
            self._carried.put([data.get(key) for key in self._keys])
            return
        if not self._run(base.compiled_read, [], self._reset_entries, rows):
            entries = self._by_vmas(lambda: base.read_ended(rows.clone()))
            self._reset_entries.put(tree_leaves(entries))
        self._finish_ended()

    def _finish_ended(self) -> None:
        """What the next step has after a reset of the environments that are done."""
        ended, n_carried = self._carried.tensors[self._done], len(self._keys)
        finish = self._functions.finish_reset[bool(ended.all())]
        finish.inputs[:n_carried] = self._carried.addresses
        finish.inputs[n_carried] = self._carried.addresses[self._done]
        finish.outputs[:] = self._following.addresses
        if not finish():
            leaves = [*self._carried.tensors, ended, *self._reset_entries.tensors]
            self._following.put(self._torchrl.reset(self._env, self._data, [leaf.clone() for leaf in leaves]))
        self._carry_on()

    def _run(
        self,
        function: CompiledFunction,
        arguments: Sequence[int] | np.ndarray,
        results: Columns,
        rows: Tensor | None = None,
    ) -> bool:
        """Calls a function of the simulator on the buffers; whether it stands for the simulator's now."""
        state = self._state
        after = state.buffers
        if function.changes_state:
            after = self._spare()
        with self._base._drawing() if function.draws else contextlib.nullcontext():
            holds = function.run(arguments, after, results.buffers, rows)
        if function.changes_state:
            before = state.buffers
            if holds:
                state.move(after)
            unused = before if holds else after
            if unused is not self._held:
                self._spares.append(unused)
        return holds

    def _by_vmas(self, function: Callable[[], Any]) -> Any:
        """Calls a function of the environment, whose objects hold the state before and afterwards."""
        self._hold()
        result = function()
        self._follow_variant()
        self._is_attached = self._state.attach()
        self._held = self._state.buffers
        if self._is_attached:
            self._base.n_left_to_vmas = 0
        return result

    def _compare(self) -> None:
        """Compares the compiled functions with TorchRL on the data that the policy acts on next."""
        base, data = self._base, self._data
        self._begin(data)
        carried = [tensor.clone() for tensor in self._carried.tensors]
        drawn, generator = list(base._random_state), torch.get_rng_state()
        self._choose_actions()
        torch.set_rng_state(generator)
        chosen, actions = self._choose_by_torchrl(carried)
        names = [*map(str, self._torchrl.chosen_keys), *["an action"] * len(actions)]
        check_equal(names, [*self._chosen.tensors, *self._actions.tensors], [*chosen, *actions])
        with left_as_it_is(base._env):
            entries = tree_leaves(base._take_step(actions))
            read_entries = tree_leaves(base._read(base._env)) if self._functions.finish_reset else []
        self._state.attach()
        base._random_state, base.n_left_to_vmas = drawn, 0
        self._entries.put(entries)
        stored, following = self._torchrl.finish(
            self._env, data, [*carried, *self._chosen.tensors, *self._entries.tensors]
        )
        rows = [
            torch.empty_like(value, memory_format=torch.contiguous_format).unsqueeze(1) for value in stored.values()
        ]
        self._functions.finish_step.outputs[: len(rows)] = [row.data_ptr() for row in rows]
        self._functions.finish_step.strides[: len(rows)] = [row.stride(0) for row in rows]
        self._finish_data(rows, 0)
        check_equal([*map(str, stored)], [row[:, 0] for row in rows], [*stored.values()])
        check_equal([*map(str, self._keys)], self._carried.tensors, following)
        for are_all, ended in some_and_all(len(carried[0])):
            if are_all in self._functions.finish_reset:
                self._carried.put(carried)
                self._carried.tensors[self._done].copy_(ended)
                self._reset_entries.put(read_entries)
                leaves = [tensor.clone() for tensor in self._carried.tensors]
                following = self._torchrl.reset(self._env, data, [*leaves, ended, *read_entries])
                self._finish_ended()
                check_equal([*map(str, self._keys)], self._carried.tensors, following)


def _check_bounds_once(policy: Policy) -> None:
    """Gives a policy the equal of TorchRL's ``TanhNormal`` that does not compare its bounds at each step."""
    for module in policy.modules() if isinstance(policy, nn.Module) else ():
        if isinstance(module, ProbabilisticTensorDictModule) and module.distribution_class is TanhNormal:
            module.distribution_class = BoundedTanhNormal
