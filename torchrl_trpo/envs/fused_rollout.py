"""Rollouts of a policy in compiled VMAS, with nothing but compiled functions at each step."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torchrl.envs import EnvBase
from torchrl.envs.utils import exploration_type
from torchrl.modules.tensordict_module.exploration import RandomPolicy

from torchrl_trpo.envs.compiled import CompiledFunction, check_equal
from torchrl_trpo.envs.flat_state import NotCompiled
from torchrl_trpo.envs.reads import Untraceable
from torchrl_trpo.envs.row_function import Columns, RowFunction
from torchrl_trpo.envs.torchrl_step import (
    Policy,
    TorchRLStep,
    base_of,
    filled,
    leaves_of,
    parameters_of,
    settings_of,
    twin_of,
)
from torchrl_trpo.envs.tracing import left_as_it_is, trace
from torchrl_trpo.kernels.compiler import CompilerError
from torchrl_trpo.kernels.lanes import Unsupported
from torchrl_trpo.kernels.networks import NetworkOperations


class FusedRollout:
    """A policy in compiled VMAS: the policy, TorchRL's transforms and resets are compiled as the simulator is.

    A step is three compiled functions: the policy with the actions' way through the inverse transforms; the simulator's
    step; and what TorchRL makes of its entries. Where episodes end, another one is what TorchRL makes of a reset.
    TorchRL's part is traced on an environment with another number of environments. What a compiled function cannot do
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
        self._env, self._policy, self._data = env, policy, data
        self._base = base_of(env)
        if self._base.compiled_step is None:
            raise NotCompiled(f"its simulator is not compiled: {self._base.why_not_compiled}")
        self._step: CompiledFunction = self._base.compiled_step
        self._state = self._base.state
        self._spares: list[dict[str, Tensor]] = []  # buffers that nothing reads
        self._finish_reset: dict[bool, RowFunction] = {}  # of some environments, and of all; TorchRL tells them apart
        self.why_policy_not_compiled: str | None = None
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._compile(*self._make_twin())
                self._settings = self._find_settings()
                self._compare()
        except (Untraceable, Unsupported, CompilerError) as error:
            raise NotCompiled(str(error)) from error

    def _make_twin(self) -> tuple[EnvBase, TensorDictBase]:
        """The environment with another number of environments, and the data after a step."""
        try:
            tensors = [*leaves_of(self._data).values(), *parameters_of(self._env, self._policy).values()]
            sizes = {size for tensor in tensors for size in tensor.shape}
            twin = twin_of(self._env, next(n for n in itertools.count(7) if n not in sizes))
            data = twin.reset()
            for _ in range(2):  # the first steps make attributes
                data = twin.step_and_maybe_reset(twin.rand_action(data))[1]
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:  # of any user's transform
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise NotCompiled(f"its transforms refuse another number of environments: {reason}") from error
        return twin, data

    def _compile(self, twin: EnvBase, data: TensorDictBase) -> None:
        layout, base = self._state.layout, base_of(twin)
        step, read = self._base.compiled_step, self._base.compiled_read
        before, after = leaves_of(self._data), leaves_of(self._policy(self._data.copy()))
        written = {key: value for key, value in after.items() if value is not before.get(key)}
        carried = {key: value for key, value in leaves_of(data).items() if key not in twin.action_keys}
        chosen = {key: value.new_zeros(len(data), *value.shape[1:]) for key, value in written.items()}
        self._carried_keys, self._chosen_keys = list(carried), list(chosen)
        self._torchrl = TorchRLStep(carried, chosen, step.structure, None if read is None else read.structure)
        data = data.select(*carried)
        self._check_entries(twin)

        actions = self._torchrl.choose(twin, data, [*carried.values(), *chosen.values()], None)[1]
        entries = tree_leaves(base._advance(base._env, *actions))
        self._carried, self._following = (Columns.like(layout, [*carried.values()]) for _ in range(2))
        self._chosen = Columns.like(layout, [*chosen.values()])
        self._actions = Columns.like(layout, actions)
        self._done = self._carried_keys.index("done")
        self._adopt()

        settings = settings_of(twin)
        policy = self._policy
        if isinstance(policy, RandomPolicy) and policy.action_spec == self._env.full_action_spec:
            policy = RandomPolicy(twin.full_action_spec)  # its actions have a shape of their own
        try:
            self._act = self._compile_acting(twin, data, [*carried.values()], policy)
        except (Unsupported, RuntimeError, ValueError, LookupError) as error:
            self.why_policy_not_compiled = str(error).splitlines()[0]
            self._act = self._compile_acting(twin, data, [*carried.values(), *chosen.values()], None)

        def finish(*leaves: Tensor) -> list[Tensor]:
            stored, following = self._torchrl.finish(twin, data, leaves)
            self._stored_keys = list(stored)
            return [*stored.values(), *following]

        inputs = [*carried.values(), *chosen.values(), *entries]
        self._finish_step = self._compile_torchrl(twin, finish, inputs, by_row=lambda n: n - len(carried))
        if read is not None:
            entries = tree_leaves(base._read(base._env))
            for are_all, ended in self._some_and_all(len(data)):
                self._finish_reset[are_all] = self._compile_torchrl(
                    twin,
                    lambda *leaves: self._torchrl.reset(twin, data, leaves),
                    [*carried.values(), ended, *entries],
                    by_row=lambda n: 0,
                )
        if settings_of(twin) != settings:
            raise NotCompiled("a transform changes its own attributes at each step")
        self._connect()

    def _connect(self) -> None:
        """Sets the addresses that stay."""
        n_carried, n_chosen = len(self._carried_keys), len(self._chosen_keys)
        written = [self._actions.addresses]
        if self.why_policy_not_compiled is None:
            written = [self._chosen.addresses, *written]
        else:
            self._act.inputs[n_carried : n_carried + n_chosen] = self._chosen.addresses
        self._act.outputs[:] = np.concatenate(written)
        chosen = np.concatenate([self._chosen.addresses, self._entries.addresses])
        self._finish_step.inputs[n_carried : n_carried + len(chosen)] = chosen
        for function in self._finish_reset.values():
            entries = self._reset_entries.addresses
            function.inputs[n_carried + 1 : n_carried + 1 + len(entries)] = entries

    def _check_entries(self, twin: EnvBase) -> None:
        """Checks that TorchRL does at a step what is done here."""
        other = (set(self._carried_keys) ^ set(leaves_of(self._data))) - set(self._chosen_keys)
        if other:
            raise NotCompiled(f"entries are not there at each step: {', '.join(map(str, other))}")
        self._data = self._data.select(*self._carried_keys)
        if list(twin.reset_keys) != ["_reset"] or not {"done", "terminated"} <= set(twin.done_keys):
            raise NotCompiled(f"its reset keys are {twin.reset_keys}, its done keys {twin.done_keys}")

    def _results_of(self, function: CompiledFunction) -> tuple[dict[str, Tensor], Columns]:
        """Buffers for the results of a compiled function."""
        buffers = {kind: buffer.zero_() for kind, buffer in function.results.empty().items()}
        return buffers, Columns([function.results.view(buffers, slot) for slot in function.slots])

    def _compile_acting(
        self, twin: EnvBase, data: TensorDictBase, inputs: Sequence[Tensor], policy: Policy | None
    ) -> RowFunction:
        """The policy, and what its actions are for the simulator; without a policy, the latter alone."""

        def act(*leaves: Tensor) -> list[Tensor]:
            chosen, actions = self._torchrl.choose(twin, data, leaves, policy)
            return [*chosen, *actions]

        graph = make_fx(act, tracing_mode="real")(*inputs)
        names = [f"input{number}" for number in range(len(inputs))]
        parameters = parameters_of(twin, self._policy)
        lowered = NetworkOperations(graph, len(inputs[0]), parameters).lower([
            (name, tensor, 0) for name, tensor in zip(names, inputs, strict=True)
        ])
        results = lowered.outputs if policy is not None else lowered.outputs[len(self._chosen_keys) :]
        return RowFunction(lowered, self._state.layout, [*names, *parameters], by_lane=results)

    def _compile_torchrl(
        self, twin: EnvBase, function: Callable[..., Any], inputs: Sequence[Tensor], by_row: Callable[[int], int]
    ) -> RowFunction:
        """A function of TorchRL's; ``by_row`` says how many of its results are written as rows."""
        simulator = base_of(twin)._env
        traced = trace(simulator, function, inputs)
        places = [(path, tensor, None) for path, tensor in zip(traced.before.paths, traced.before.tensors, strict=True)]
        names = [f"input{number}" for number in range(len(inputs))]
        parameters = parameters_of(twin, self._policy)
        named = [(name, tensor, 0) for name, tensor in zip(names, inputs, strict=True)]
        lowered = NetworkOperations(traced.graph, len(inputs[0]), parameters).lower([*places, *named])
        n_guards = len(traced.expected)
        results = lowered.outputs[len(places) : len(lowered.outputs) - n_guards]
        n_by_row = by_row(len(results))
        branches = zip(lowered.outputs[len(lowered.outputs) - n_guards :], traced.expected, strict=True)
        return RowFunction(
            lowered,
            self._state.layout,
            [*names, *parameters],
            by_row=results[:n_by_row],
            by_lane=results[n_by_row:],
            guards=list(branches),
        )

    # The rollout

    def _find_settings(self) -> list[Any]:
        parameters = parameters_of(self._env, self._policy).values()
        shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in parameters]
        return [exploration_type(), shapes, settings_of(self._env), settings_of(self._policy)]

    def is_current(self) -> bool:
        """Whether policy and environment are what they were when they were compiled, apart from their numbers."""
        return self._find_settings() == self._settings

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
        rows = [batch.get(key) for key in self._stored_keys]
        first = np.array([tensor.data_ptr() for tensor in rows], np.uint64)
        step = np.array([tensor.stride(1) * tensor.element_size() for tensor in rows], np.uint64)
        self._finish_step.strides[: len(rows)] = [tensor.stride(0) for tensor in rows]
        for time in range(batch.shape[1]):
            self._finish_step.outputs[: len(rows)] = first + step * np.uint64(time)
            self._choose_actions()
            self._simulate()
            self._finish_data(rows, time)
            ended = self._carried.tensors[self._done]
            if ended.any():
                self._reset_ended(ended)
        if self._is_attached:
            self._state.hold(self._state.buffers)
        return filled(data, self._carried_keys, [tensor.clone() for tensor in self._carried.tensors])

    def _begin(self, data: TensorDictBase) -> None:
        self._carried.put([data.get(key) for key in self._carried_keys])
        parameters = [tensor.data_ptr() for tensor in parameters_of(self._env, self._policy).values()]
        for function in (self._act, self._finish_step, *self._finish_reset.values()):
            function.inputs[len(function.inputs) - len(parameters) :] = parameters
        if self._base.compiled_step is not self._step:
            self._adopt()
            self._connect()
        self._is_attached = self._state.attach()
        self._held = self._state.buffers

    def _choose_actions(self) -> None:
        n_carried = len(self._carried_keys)
        if self.why_policy_not_compiled is not None:
            acted = self._policy(filled(self._data, self._carried_keys, [t.clone() for t in self._carried.tensors]))
            self._chosen.put([acted.get(key) for key in self._chosen_keys])
        self._act.inputs[:n_carried] = self._carried.addresses
        self._act()

    def _simulate(self) -> None:
        if not (self._is_attached and self._run(self._step, self._actions.addresses, self._step_results)):
            actions = [action.clone() for action in self._actions.tensors]
            entries = self._by_vmas(lambda: self._base._take_step(actions))
            self._entries.put(tree_leaves(entries))  # another variant has other entries

    def _finish_data(self, rows: Sequence[Tensor], time: int) -> None:
        """Writes the data of the step, ``rows`` ``[n, T, ...]`` at a time, and what the next step has."""
        finish = self._finish_step
        finish.inputs[: len(self._carried_keys)] = self._carried.addresses
        finish.outputs[len(rows) :] = self._following.addresses
        if not finish():
            leaves = [*self._carried.tensors, *self._chosen.tensors, *self._entries.tensors]
            stored, following = self._torchrl.finish(self._env, self._data, [leaf.clone() for leaf in leaves])
            for row, value in zip(rows, stored.values(), strict=True):
                row[:, time] = value
            self._following.put(following)
        self._carried, self._following = self._following, self._carried

    def _reset_ended(self, ended: Tensor) -> None:
        base, rows = self._base, ended.squeeze(-1)
        is_compiled = self._finish_reset and base.compiled_read is not None and self._is_attached
        if not is_compiled or not base.pool.put(rows):
            data = filled(self._data, self._carried_keys, [tensor.clone() for tensor in self._carried.tensors])
            data = self._by_vmas(lambda: self._env.reset(data.set("_reset", ended.clone()), select_reset_only=True))
            self._carried.put([data.get(key) for key in self._carried_keys])
            return
        if not self._run(base.compiled_read, [], self._read_results, rows):
            entries = self._by_vmas(lambda: base.read_ended(rows.clone()))
            self._reset_entries.put(tree_leaves(entries))
        self._finish_ended()

    def _finish_ended(self) -> None:
        """What the next step has after a reset of the environments that are done."""
        ended, n_carried = self._carried.tensors[self._done], len(self._carried_keys)
        finish = self._finish_reset[bool(ended.all())]
        finish.inputs[:n_carried] = self._carried.addresses
        finish.inputs[n_carried] = self._carried.addresses[self._done]
        finish.outputs[:] = self._following.addresses
        if not finish():
            leaves = [*self._carried.tensors, ended, *self._reset_entries.tensors]
            self._following.put(self._torchrl.reset(self._env, self._data, [leaf.clone() for leaf in leaves]))
        self._carried, self._following = self._following, self._carried

    def _run(
        self,
        function: CompiledFunction,
        arguments: Sequence[int] | np.ndarray,
        results: dict[str, Tensor],
        rows: Tensor | None = None,
    ) -> bool:
        """Calls a function of the simulator on the buffers; whether it stands for the simulator's now."""
        state = self._state
        after = state.buffers
        if function.changes_state:
            after = self._spares.pop() if self._spares else state.layout.empty()
        with self._base._drawing() if function.draws else contextlib.nullcontext():
            holds = function.run(arguments, after, results, rows)
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
        if self._is_attached:
            self._state.hold(self._state.buffers)
        result = function()
        if self._base.compiled_step is not self._step:
            self._adopt()
            self._connect()
        self._is_attached = self._state.attach()
        self._held = self._state.buffers
        if self._is_attached:
            self._base.n_left_to_vmas = 0
        return result

    def _adopt(self) -> None:
        """Takes over the simulator's functions, which may be those of another variant."""
        base = self._base
        self._step, self._state, self._spares = base.compiled_step, base.state, []
        self._step_results, self._entries = self._results_of(base.compiled_step)
        if base.compiled_read is not None:
            self._read_results, self._reset_entries = self._results_of(base.compiled_read)

    def _compare(self) -> None:
        """Compares the compiled functions with TorchRL on the data that the policy acts on next."""
        base, data = self._base, self._data
        self._begin(data)
        carried = [tensor.clone() for tensor in self._carried.tensors]
        drawn, generator = list(base._random_state), torch.get_rng_state()
        self._choose_actions()
        torch.set_rng_state(generator)
        policy = self._policy if self.why_policy_not_compiled is None else None
        leaves = carried if policy is not None else [*carried, *self._chosen.tensors]
        chosen, actions = self._torchrl.choose(self._env, data, leaves, policy)
        names = [*map(str, self._chosen_keys), *["an action"] * len(actions)]
        check_equal(names, [*self._chosen.tensors, *self._actions.tensors], [*chosen, *actions])
        with left_as_it_is(base._env):
            entries = tree_leaves(base._take_step(actions))
            read_entries = tree_leaves(base._read(base._env)) if self._finish_reset else []
        self._state.attach()
        base._random_state, base.n_left_to_vmas = drawn, 0
        self._entries.put(entries)
        stored, following = self._torchrl.finish(
            self._env, data, [*carried, *self._chosen.tensors, *self._entries.tensors]
        )
        rows = [
            torch.empty_like(value, memory_format=torch.contiguous_format).unsqueeze(1) for value in stored.values()
        ]
        self._finish_step.outputs[: len(rows)] = [row.data_ptr() for row in rows]
        self._finish_step.strides[: len(rows)] = [row.stride(0) for row in rows]
        self._finish_data(rows, 0)
        check_equal([*map(str, stored)], [row[:, 0] for row in rows], [*stored.values()])
        check_equal([*map(str, self._carried_keys)], self._carried.tensors, following)
        for are_all, ended in self._some_and_all(len(carried[0])):
            if are_all in self._finish_reset:
                self._carried.put(carried)
                self._carried.tensors[self._done].copy_(ended)
                self._reset_entries.put(read_entries)
                leaves = [tensor.clone() for tensor in self._carried.tensors]
                following = self._torchrl.reset(self._env, data, [*leaves, ended, *read_entries])
                self._finish_ended()
                check_equal([*map(str, self._carried_keys)], self._carried.tensors, following)

    @staticmethod
    def _some_and_all(n: int) -> list[tuple[bool, Tensor]]:
        """Which environments may have ended: every other one, or all, between which TorchRL makes a difference."""
        numbers = torch.arange(n).unsqueeze(-1)
        return [*([(False, numbers % 2 == 0)] if n > 1 else []), (True, numbers >= 0)]
