"""What TorchRL does at a step and a reset of an environment, as functions of tensors."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.synchronize import SemLock
from typing import Any

from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase, TensorDictParams
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_trpo.kernels import settings
from torchrl_trpo.kernels.buffers import NotCompiled

_LOCKS = (type(threading.Lock()), type(threading.RLock()), SemLock)
Policy = Callable[[TensorDictBase], TensorDictBase]


class TorchRLStep:
    """What TorchRL does before and after the simulator's part of a step, and after that of a reset.

    Each method takes the environment, or one with another number of environments, data of its batch size, and the
    leaves that are put into the data.

    Args:
        carried_keys: the entries that one step leaves to the next.
        chosen_keys: the entries that the policy writes.
        step_structure: the structure of what the simulator's part of a step gives.
        read_structure: the structure of what the simulator's part of a reset gives; None if that is not compiled.
    """

    def __init__(
        self,
        carried_keys: Iterable[NestedKey],
        chosen_keys: Iterable[NestedKey],
        step_structure: TreeSpec,
        read_structure: Any,
    ) -> None:
        self.carried_keys = list(carried_keys)
        self.chosen_keys = list(chosen_keys)
        self._step_structure = step_structure
        self._read_structure = read_structure

    def choose(
        self, env: EnvBase, data: TensorDictBase, leaves: Sequence[Tensor], policy: Policy | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the policy writes, and the actions of the simulator. Without a policy, the leaves have the former."""
        keys = self.carried_keys if policy is not None else [*self.carried_keys, *self.chosen_keys]
        acted = filled(data, keys, leaves)
        if policy is not None:
            acted.update(policy(acted))

        def stop(actions: list[Tensor]) -> Any:
            raise _Actions(actions)

        try:
            with _simulated(env, stop):
                env.step(acted.copy())
        except _Actions as taken:
            return [acted.get(key) for key in self.chosen_keys], taken.actions
        raise AssertionError("a step takes a step of the simulator")

    def finish(
        self, env: EnvBase, data: TensorDictBase, leaves: Sequence[Tensor]
    ) -> tuple[dict[NestedKey, Tensor], list[Tensor]]:
        """The data of a step, and what the next one has; ``leaves`` are before, chosen, and of the simulator."""
        keys = [*self.carried_keys, *self.chosen_keys]
        entries = tree_unflatten(leaves[len(keys) :], self._step_structure)
        with _simulated(env, lambda actions: entries):
            data = env.step(filled(data, keys, leaves[: len(keys)]))
        following = env._step_mdp(data)
        if env._post_step_mdp_hooks is not None:
            data, following = env._post_step_mdp_hooks(data, following)
        return leaves_of(data), [following.get(key) for key in self.carried_keys]

    def reset(self, env: EnvBase, data: TensorDictBase, leaves: Sequence[Tensor]) -> list[Tensor]:
        """What the next step has; ``leaves`` are after the step, which have ended, and of the simulator."""
        n_carried = len(self.carried_keys)
        entries = tree_unflatten(leaves[n_carried + 1 :], self._read_structure)
        data = filled(data, [*self.carried_keys, "_reset"], leaves[: n_carried + 1])
        with _simulated(env, lambda ended: entries):
            data = env.reset(data, select_reset_only=True)
        return [data.get(key) for key in self.carried_keys]


class _Actions(Exception):
    """The actions that the simulator is given."""

    def __init__(self, actions: list[Tensor]) -> None:
        super().__init__()
        self.actions = actions


def base_of(env: EnvBase) -> Any:
    """The environment inside all transforms."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def twin_of(env: Any, num_envs: int) -> EnvBase:
    """The same environment and transforms with another number of environments."""
    if isinstance(env, TransformedEnv):
        return TransformedEnv(twin_of(env.base_env, num_envs), env.transform.clone(), auto_unwrap=False)
    return env.make_twin_env(num_envs)


@contextlib.contextmanager
def _simulated(env: EnvBase, function: Callable[[Any], Any]) -> Iterator[None]:
    """Replaces the simulator's step and reset inside the context; the function gives their entries."""
    base, n_calls = base_of(env), itertools.count(1)

    def simulate(given: Any) -> Any:
        if next(n_calls) > 1:
            raise NotCompiled("a transform takes several steps of the simulator in one")
        return function(given)

    base._take_step = base._reset_some = simulate
    try:
        yield
    finally:
        del base._take_step, base._reset_some


def leaves_of(data: TensorDictBase) -> dict[NestedKey, Tensor]:
    """The tensors of data by their keys."""
    parts = [data, *(value for value in data.values(True) if isinstance(value, TensorDictBase))]
    if any(isinstance(part, LazyStackedTensorDict) for part in parts):
        raise NotCompiled("the agents of a group have other observations or actions")
    return dict(data.items(True, True))


def filled(data: TensorDictBase, keys: Sequence[NestedKey], leaves: Sequence[Tensor]) -> TensorDictBase:
    """Data with other leaves."""
    data = data.copy()
    for key, leaf in zip(keys, leaves, strict=True):
        data.set(key, leaf)
    return data


def _modules_of(root: Any) -> list[tuple[str, nn.Module]]:
    roots = []
    while isinstance(root, TransformedEnv):
        roots.append(root.transform)
        root = root.base_env
    if not roots and isinstance(root, nn.Module) and not isinstance(root, EnvBase):
        roots = [root]
    return [(f"{number}.{name}", module) for number, each in enumerate(roots) for name, module in each.named_modules()]


def parameters_of(env: EnvBase, policy: Policy) -> dict[str, Tensor]:
    """The tensors of policy and transforms whose numbers may change between rollouts."""
    found: dict[str, Tensor] = {}
    for owner, root in (("policy", policy), ("env", env)):
        for name, module in _modules_of(root):
            found |= {f"{owner}.{name}.{key}": tensor for key, tensor in _own_tensors(module)}
    for name, tensor in found.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise NotCompiled(f"{name} is not contiguous, or not on the CPU")
    return found


def settings_of(root: Any) -> tuple[Any, ...]:
    """What the modules of a policy, or of an environment's transforms, are besides their tensors."""
    return settings.settings_of(_modules_of(root))


def constants_of(*roots: Any) -> list[Tensor]:
    """The tensors whose values :func:`settings_of` compares."""
    return [tensor for root in roots for tensor in settings.constants_of(_modules_of(root))]


def tensors_of(root: Any) -> list[Tensor]:
    """The parameters and buffers of the modules of a policy, or of an environment's transforms."""
    return [tensor for _, module in _modules_of(root) for _, tensor in _own_tensors(module)]


def _own_tensors(module: nn.Module) -> list[tuple[NestedKey, Tensor]]:
    """The parameters and buffers of a module, without those of its parts, by name."""
    if isinstance(module, TensorDictParams):  # what to_module puts there, its lists of parameters do not have
        return [*module.items(True, True)]
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def check_locks(*roots: Any) -> None:
    """Raises NotCompiled if a module holds a lock: it might be left locked where a trace ends in an error."""
    for root in roots:
        for _, module in _modules_of(root):
            for name, value in vars(module).items():
                if isinstance(value, _LOCKS):
                    raise NotCompiled(f"{type(module).__name__} holds a lock, {name}")


@contextlib.contextmanager
def left_as_they_are(*roots: Any) -> Iterator[None]:
    """Restores attributes and buffers of policies and of environments' transforms after the context."""
    attributes = [vars(module) for root in roots for _, module in _modules_of(root)]
    values = [value for each in attributes for value in each.values()]
    within = [value for value in values if isinstance(value, (dict, list, set))]
    within += [vars(value) for value in values if settings.is_plain_object(value)]
    held = [(holder, holder.copy()) for holder in (*attributes, *within)]
    parts = [part for holder, _ in held for part in (holder.values() if isinstance(holder, dict) else holder)]
    tensors = [(part, part.clone()) for part in parts if isinstance(part, Tensor) and not part.is_meta]
    try:
        yield
    finally:
        for holder, before in held:
            holder.clear()
            holder.extend(before) if isinstance(holder, list) else holder.update(before)
        for tensor, old in tensors:
            if not bool(((tensor == old) | ((tensor != tensor) & (old != old))).all()):  # some writes are not counted
                tensor.data.copy_(old)
