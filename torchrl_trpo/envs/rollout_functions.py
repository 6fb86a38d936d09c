"""The compiled functions of a rollout: the policy, and what TorchRL does at a step and at a reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchrl.envs import EnvBase
from torchrl.modules.tensordict_module.exploration import RandomPolicy

from torchrl_trpo.envs.torchrl_step import (
    Policy,
    TorchRLStep,
    base_of,
    check_locks,
    constants_of,
    filled,
    leaves_of,
    parameters_of,
    settings_of,
    tensors_of,
    twin_of,
)
from torchrl_trpo.envs.tracing import numpys_and_pythons_generator, trace
from torchrl_trpo.kernels.buffers import Buffers, NotCompiled, unused_size
from torchrl_trpo.kernels.lanes import Lowered, Unsupported
from torchrl_trpo.kernels.networks import NetworkOperations
from torchrl_trpo.kernels.record import record
from torchrl_trpo.kernels.row_function import RowFunction
from torchrl_trpo.seeding import untouched_generators

_NAMES = {"name", "_name"}  # of the agents, which TorchRL reads
_IMMUTABLE = 1 << 8  # among the flags of a class: what is read of it cannot be noted, and is taken to be all


class RolloutFunctions:
    """What happens at a step around the simulator, compiled. It is traced on an environment of another size.

    The inputs of each function are followed by the parameters of policy and transforms.

    Args:
        env: a :class:`~torchrl_trpo.envs.CompiledVmasEnv`, or a ``TransformedEnv`` of one.
        policy: the policy, compiled if it can be.
        data: the data that the policy acts on next.

    Attributes:
        torchrl: what TorchRL does, not compiled; it knows the keys that a step leaves to the next, and the policy's.
        carried: tensors like those that a step leaves to the next, with another number of environments.
        chosen: tensors like those that the policy writes.
        actions: tensors like the simulator's actions.
        stored_keys: the keys of the data of a step.
        act: from ``carried`` to ``chosen`` and ``actions``; if the policy is not compiled, from ``carried`` and
            ``chosen`` to ``actions``.
        finish_step: from ``carried``, ``chosen`` and the simulator's entries to the data of a step, written as rows,
            and what it leaves to the next.
        finish_reset: from ``carried``, which environments have ended and the simulator's entries to what is left to the
            next step. By whether all have ended: TorchRL makes a difference. Empty if resets are not compiled.
        why_policy_not_compiled: why the policy is not compiled; None if it is.

    Raises:
        NotCompiled: if there is an environment, transform or entry that cannot be compiled, with the reason.
    """

    def __init__(self, env: EnvBase, policy: Policy, data: TensorDictBase) -> None:
        check_locks(env, policy)
        base = base_of(env)
        step, read = base.compiled_step, base.compiled_read
        self._layout: Buffers = base.state.layout
        self._policy = policy
        of_policy = constants_of(policy)  # before it is called, which may make others of its parameters
        self._twin, of_twin = _twin_after_a_step(env, [*leaves_of(data).values(), *parameters_of(env, policy).values()])
        twin = self._twin
        before = leaves_of(data)
        written, self.why_policy_not_compiled = _written(data, policy)
        carried = {key: value for key, value in leaves_of(of_twin).items() if key not in twin.action_keys}
        _check_entries(twin, (set(carried) ^ set(before)) - set(written))
        self.torchrl = TorchRLStep(carried, written, step.structure, None if read is None else read.structure)
        self._data = of_twin.select(*carried)
        self.carried = list(carried.values())
        self.chosen = [value.new_zeros(len(self._data), *value.shape[1:]) for value in written.values()]
        self.actions = self.torchrl.choose(twin, self._data, [*self.carried, *self.chosen], None)[1]

        self._constants = [*of_policy, *constants_of(twin)]
        settings, of_transforms = settings_of(twin), tensors_of(twin)
        if isinstance(policy, RandomPolicy) and policy.action_spec == env.full_action_spec:
            policy = RandomPolicy(twin.full_action_spec)  # its actions have a shape of their own
        if self.why_policy_not_compiled is None:
            try:
                self.act = self._compile_acting(self.carried, policy)
            except Exception as error:  # any user's policy
                self.why_policy_not_compiled = next(iter(str(error).splitlines()), repr(error))
        if self.why_policy_not_compiled is not None:
            self.act = self._compile_acting([*self.carried, *self.chosen], None)
        simulator = base_of(twin)
        entries = tree_leaves(simulator._advance(simulator._env, *self.actions))
        self.finish_step = self._compile_torchrl(
            self._finish, [*self.carried, *self.chosen, *entries], n_by_lane=len(carried)
        )
        self.finish_reset: dict[bool, RowFunction] = {}
        if read is not None:
            entries = tree_leaves(simulator._read(simulator._env))
            for are_all, ended in some_and_all(len(self._data)):
                inputs = [*self.carried, ended, *entries]
                self.finish_reset[are_all] = self._compile_torchrl(self._reset, inputs, n_by_lane=len(carried))
        if settings_of(twin) != settings or not _are_same(of_transforms, tensors_of(twin)):
            raise NotCompiled("a transform changes its own attributes at each step")

    def _finish(self, *leaves: Tensor) -> list[Tensor]:
        stored, following = self.torchrl.finish(self._twin, self._data, leaves)
        self.stored_keys = list(stored)
        return [*stored.values(), *following]

    def _reset(self, *leaves: Tensor) -> list[Tensor]:
        return self.torchrl.reset(self._twin, self._data, leaves)

    def _compile_acting(self, inputs: Sequence[Tensor], policy: Policy | None) -> RowFunction:
        """The policy, and what its actions are for the simulator; without a policy, the latter alone."""

        def act(*leaves: Tensor) -> list[Tensor]:
            chosen, actions = self.torchrl.choose(self._twin, self._data, leaves, policy)
            return [*chosen, *actions]

        if policy is not None:
            policy(self._data.copy())  # what it keeps for a batch of this size, it keeps now
        with nullcontext() if policy is None else _only_tensors(policy):
            graph = record(act, *inputs)
        lowered, names = self._lower(graph, inputs)
        results = lowered.outputs if policy is not None else lowered.outputs[len(self.chosen) :]
        return RowFunction(lowered, self._layout, names, by_lane=results)

    def _compile_torchrl(self, function: Callable[..., Any], inputs: Sequence[Tensor], n_by_lane: int) -> RowFunction:
        """A function of TorchRL's; the last of its results are written as lanes, the others as rows."""
        traced = trace(base_of(self._twin)._env, function, inputs)
        before = traced.before
        split = {path: path.rpartition(".") for path in sorted(traced.read)}
        read = [p for p, (owner, _, name) in split.items() if name not in _NAMES and _is_noted(before.objects[owner])]
        if read:
            raise NotCompiled(f"a transform reads the simulator's objects: {', '.join(read[:3])}")
        lowered, names = self._lower(traced.graph, inputs, list(zip(before.paths, before.tensors, strict=True)))
        n_guards = len(traced.expected)
        results = lowered.outputs[len(before.paths) : len(lowered.outputs) - n_guards]
        branches = zip(lowered.outputs[len(lowered.outputs) - n_guards :], traced.expected, strict=True)
        by_row, by_lane = results[: len(results) - n_by_lane], results[len(results) - n_by_lane :]
        return RowFunction(lowered, self._layout, names, by_row=by_row, by_lane=by_lane, guards=list(branches))

    def _lower(
        self, graph: fx.GraphModule, inputs: Sequence[Tensor], unused: Sequence[tuple[str, Tensor]] = ()
    ) -> tuple[Lowered, list[str]]:
        """Lowers a graph, whose first inputs are not used. Returns the names of the others and the parameters too."""
        names = [f"input{number}" for number in range(len(inputs))]
        parameters = parameters_of(self._twin, self._policy)
        named = [(name, tensor, 0) for name, tensor in zip(names, inputs, strict=True)]
        places = [(path, tensor, None) for path, tensor in unused]
        lowered = NetworkOperations(graph, len(inputs[0]), parameters, self._constants).lower([*places, *named])
        return lowered, [*names, *parameters]


def _is_noted(value: Any) -> bool:
    """Whether the attributes that are read of an object are noted."""
    return not type(value).__flags__ & _IMMUTABLE


def _written(data: TensorDictBase, policy: Policy) -> tuple[dict[Any, Tensor], str | None]:
    """The entries that a policy writes, and why they do not follow from its data and its tensors, or None.

    NotCompiled is raised if it reads at the next step what it has written.
    """
    data = data.clone()

    def act(given: TensorDictBase) -> dict[Any, Tensor]:
        with untouched_generators():
            return leaves_of(policy(given))

    before, after = leaves_of(data), act(data.copy())
    written = {key: value for key, value in after.items() if value is not before.get(key)}
    own = [key for key in written if key not in before]  # the others are the environment's at the next step
    again, following = act(data.copy()), act(filled(data, own, [written[key] for key in own]))
    for key, value in written.items():
        if not torch.equal(value.nan_to_num(), again[key].nan_to_num()):
            return written, f"it gives another {key!r} when it is called again"
        if not torch.equal(value.nan_to_num(), following[key].nan_to_num()):
            raise NotCompiled(f"the policy acts by what it has written at the step before: {key!r} differs")
    return written, None


@contextmanager
def _only_tensors(policy: Policy) -> Iterator[None]:
    """Raises Unsupported if a policy computes with anything but tensors inside the context."""
    if not isinstance(policy, (nn.Module, RandomPolicy)):
        raise Unsupported("it is a function: what it holds cannot be found. Give the collector an nn.Module")
    own = tensors_of(policy)
    before = settings_of(policy), numpys_and_pythons_generator()
    with _NoNumbers({id(tensor) for tensor in own}):
        yield
    after = settings_of(policy), numpys_and_pythons_generator()
    if after != before or not _are_same(own, tensors_of(policy)):
        raise Unsupported("it changes its own attributes, or draws random numbers from NumPy or Python")


def _are_same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether the tensors are the same objects."""
    return [*map(id, tensors)] == [*map(id, others)]


class _NoNumbers(TorchFunctionMode):
    """Refuses to make numbers of tensors, which would be constants; PyTorch refuses those of what is traced.

    Args:
        own: the identities of the policy's parameters and buffers.
    """

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own = own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", None)
        if name in {"item", "__float__", "__int__", "__index__", "__bool__"} and id(args[0]) in self._own:
            raise Unsupported("it reads a parameter or a buffer as a Python number")
        return func(*args, **(kwargs or {}))


def some_and_all(n: int) -> list[tuple[bool, Tensor]]:
    """Which of ``n`` environments may have ended, ``[n, 1]``: every other one, or all; the flag says which."""
    numbers = torch.arange(n).unsqueeze(-1)
    return [*([(False, numbers % 2 == 0)] if n > 1 else []), (True, numbers >= 0)]


def _twin_after_a_step(env: EnvBase, tensors: Sequence[Tensor]) -> tuple[EnvBase, TensorDictBase]:
    """The environment with a number of environments that is no size of the tensors, and its data after a step."""
    try:
        twin = twin_of(env, unused_size(tensors))
        data = twin.reset()
        for _ in range(2):  # the first steps make attributes
            data = twin.step_and_maybe_reset(twin.rand_action(data))[1]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:  # of any user's transform
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise NotCompiled(f"its transforms refuse another number of environments: {reason}") from error
    return twin, data


def _check_entries(twin: EnvBase, other: set[Any]) -> None:
    """Checks that TorchRL does at a step what is done here; ``other`` are entries that are not there at each step."""
    if other:
        raise NotCompiled(f"entries are not there at each step: {', '.join(map(str, other))}")
    if list(twin.reset_keys) != ["_reset"] or not {"done", "terminated"} <= set(twin.done_keys):
        raise NotCompiled(f"its reset keys are {twin.reset_keys}, its done keys {twin.done_keys}")
