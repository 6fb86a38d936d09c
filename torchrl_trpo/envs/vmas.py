"""VMAS with vectorised partial resets."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite
from torchrl.envs import VmasEnv

from torchrl_trpo.envs.object_graph import InexactError, tensors_in
from torchrl_trpo.envs.saved_state import ObjectState
from torchrl_trpo.envs.snapshot import ObjectSnapshot
from torchrl_trpo.errors import SettingError, warn
from torchrl_trpo.kernels.buffers import reason_of
from torchrl_trpo.seeding import GlobalGenerators, device_state, set_device_state, untouched_generators


class BatchedResetVmasEnv(VmasEnv):
    """TorchRL's ``VmasEnv`` with one vectorised reset of all ended environments.

    ``VmasEnv`` resets them one by one, which takes nearly all of the time when there are thousands. Here the whole
    batch is reset at once, and then everything that the scenario and its world hold (tensors of entities, sensors and
    controllers, in attributes, lists and dicts) is put back, to the bit, for the environments that go on. If a reset
    changes something that all environments share, this cannot be exact: then environments are reset one by one as in
    ``VmasEnv``, and a warning says so once. With ``grad_enabled`` they always are, because restored tensors have no
    graph. A value that a scenario draws once for its whole batch (a permutation of the agents) is common to the
    environments that are reset together, as it is after a reset of all.

    There are two more differences from ``VmasEnv``:

    - a step at which ``max_steps`` ran out is ``truncated`` and not ``terminated``;
    - each environment object has its own random numbers, on every device. VMAS's generators are shared by a process, so
      a second environment, say for evaluation, would change what the first one draws. On a GPU they are PyTorch's own,
      so the environment's seed would also be that of the policy's exploration.

    Args:
        *args: as of :class:`~torchrl.envs.VmasEnv`.

    Keyword Args:
        **kwargs: as of :class:`~torchrl.envs.VmasEnv`.

    Examples:
        >>> import torch
        >>> from torchrl_trpo.envs import BatchedResetVmasEnv
        >>> env = BatchedResetVmasEnv("balance", num_envs=32, max_steps=100, seed=0)
        >>> env.rollout(5).batch_size
        torch.Size([32, 5])
    """

    def _build_env(
        self,
        scenario: Any,
        num_envs: int,
        continuous_actions: bool,
        max_steps: int | None,
        seed: int | None,
        **scenario_kwargs: Any,
    ) -> Any:
        untouched = copy.deepcopy(scenario)  # a scenario object can be built only once
        self._time_limit = max_steps
        self.continuous_actions = continuous_actions  # VmasEnv asks the simulator for it at each step, which is slow
        shared = self.lib.simulator.environment.Environment.vmas_random_state
        if seed is None:
            seed = _draw_seed(shared)
        with untouched_generators(), _unchanged(shared):
            env = super()._build_env(scenario, num_envs, continuous_actions, None, seed, **scenario_kwargs)
            self._random_state = _generators(env)
            with self._own_random_state(env), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the first environment has warned
                size = 2 if num_envs > 2 else 3
                own = {name: scenario_kwargs[name] for name in scenario_kwargs.keys() - {"from_pixels", "pixels_only"}}
                self._arguments_of_twin = (untouched, {**own, "seed": seed})
                self._shared, error = self._find_shared(env, size)
            self._random_state = _generators(env)
        self._why_slowly = "gradients are to pass through them" if env.grad_enabled else error
        if error:
            warn(
                f"{self.scenario_name}: ended environments are reset one by one, which is slow when there are many. It "
                f"cannot be made with another number of environments, as a vectorised reset needs it: {error}.",
            )
        roots = {f"{type(each).__name__} {each.name}": each for each in (*env.world.agents, *env.world.landmarks)}
        roots |= {"scenario": env.scenario, "world": env.world, "agents": env.agents}
        self._object_state = ObjectState(roots, env.device)
        return env

    def _find_shared(self, simulator: Any, size: int) -> tuple[set[str], str]:
        """The paths of tensors that only seem to have rows for environments; or an error of one of another size."""
        try:
            twin = self._make_twin(simulator, size)
        except Exception as error:  # what it is given may have a row for each environment
            return set(), reason_of(error)
        return _shared_tensors(simulator, twin), ""

    def _make_twin(self, simulator: Any, num_envs: int) -> Any:
        """The same simulator with another number of environments."""
        untouched, settings = self._arguments_of_twin
        device, is_continuous = simulator.device, simulator.continuous_actions
        return self.lib.make_env(copy.deepcopy(untouched), num_envs, device, is_continuous, **settings)

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the simulator's state, down to its next random numbers, for ``state_dict()``.

        It ends with an :class:`~torchrl_trpo.envs.object_graph.InexactError` if it cannot be saved exactly.

        Returns:
            The state, made of dicts, lists, tensors, numbers and strings.
        """
        drawn = [*self._random_state[:3], *({self._env.device.type: state} for state in self._random_state[3:])]
        state = self._object_state.save(self._env.steps, drawn, self._why_slowly)
        return {"scenario": self._scenario_title(), **state}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state into the simulator, for ``load_state_dict()``.

        On another kind of device than that of the state, the device's generator keeps its own state.

        Args:
            state: from :meth:`get_extra_state`, of an environment with the same arguments.

        Raises:
            SettingError: if the state is of another scenario, or of one with other arguments.
        """
        if state["scenario"] != self._scenario_title():
            names = f"{state['scenario']!r}, and this is {self._scenario_title()!r}"
            raise SettingError(f"The saved state is of the scenario {names}.")
        self._env.steps, drawn, self._why_slowly = self._object_state.load(state)
        of_torch, *of_others = drawn[:3]
        on_device = [state[kind] for state in drawn[3:] if (kind := self._env.device.type) in state]
        self._random_state = [of_torch.cpu(), *of_others, *(on_device or self._random_state[3:])]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:
        """Loads a state, from here or another process: the environment goes on from there, to the bit.

        Args:
            state_dict: the state.
            strict: whether the simulator's state is loaded. TorchRL's ``EnvCreator`` loads one environment's state into
                all others with ``strict=False``, which would give them the same random numbers.
            **kwargs: as of :class:`torch.nn.Module`.

        Returns:
            Which keys were missing or not expected.
        """
        if not strict:
            state_dict = {key: value for key, value in state_dict.items() if key != "_extra_state"}
        return super().load_state_dict(state_dict, strict=strict, **kwargs)

    def _scenario_title(self) -> str:
        name = self.scenario_name
        return name if isinstance(name, str) else type(name).__qualname__

    def _make_specs(self, env: Any) -> None:
        super()._make_specs(env)
        if self._time_limit is not None:
            flag = Categorical(2, shape=(1,), dtype=torch.bool, device=self.device)
            names = ("done", "terminated", "truncated")
            self.full_done_spec_unbatched = Composite({name: flag.clone() for name in names}, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        with untouched_generators(), self._own_random_state(self._env):  # VMAS seeds the generators of all devices
            super()._set_seed(seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._wrap(self._take_step(self._actions(tensordict)))

    def _take_step(self, actions: Sequence[Tensor]) -> dict[str, Any]:
        """Takes a step; the entries of its data."""
        with self._drawing():
            return self._advance(self._env, *actions)

    def _actions(self, tensordict: TensorDictBase) -> list[Tensor]:
        """The actions of the agents, in VMAS's order, ``[num_envs, action size]``."""
        actions: dict[str, Tensor] = {}
        for group, names in self.group_map.items():
            of_agents = self.read_action(tensordict.get((group, "action")), group=group)
            actions |= {name: action.reshape(len(action), -1) for name, action in zip(names, of_agents, strict=True)}
        return [actions[agent.name] for agent in self._env.agents]

    def _advance(self, simulator: Any, *actions: Tensor) -> dict[str, Any]:
        """Takes a step of a simulator; the entries of its data."""
        return self._entries(simulator, *undecorated(simulator, "step")(list(actions)))

    def _reset_all(self) -> None:
        with self._drawing():
            undecorated(self._env, "reset")(return_observations=False)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        ended = None if tensordict is None else tensordict.get("_reset", None)
        if ended is None:
            self._reset_all()
            with self._drawing():
                return self._wrap(self._read(self._env))
        return self._wrap(self._reset_some(ended.squeeze(-1)))

    def _reset_some(self, ended: Tensor) -> dict[str, Any]:
        """Resets the ended environments, bool ``[num_envs]``; the entries of all."""
        with self._drawing():
            entries = self._reset_together(ended)
            if entries is None:
                for index in ended.nonzero().squeeze(-1).tolist():
                    undecorated(self._env, "reset_at")(index, return_observations=False)
                entries = self._read(self._env)
            return entries

    def _reset_together(self, ended: Tensor) -> dict[str, Any] | None:
        """Resets the ended environments at once. If that cannot be exact, changes nothing and returns None."""
        if self._why_slowly:
            return None
        env = self._env
        snapshot = ObjectSnapshot((env.scenario, env.world), env.num_envs, self._shared)
        steps, drawn = env.steps, GlobalGenerators().state_dict()
        try:
            if snapshot.hidden:
                raise InexactError(snapshot.hidden)
            undecorated(env, "reset")(return_observations=False)
            env.steps = torch.where(ended, env.steps, steps)
            snapshot.keep(~ended)
            entries = self._read(env)
            snapshot.keep(~ended)  # computing observations may change the scenario
        except InexactError as error:
            snapshot.restore()
            env.steps = steps
            GlobalGenerators().load_state_dict(drawn)
            self._why_slowly = str(error)
            warn(
                f"{self.scenario_name}: ended environments are reset one by one, which is slow when there are many. A "
                f"vectorised reset would change those that go on: {self._why_slowly}. Many scenarios change it only "
                "when all are reset: then a policy is trained for what it was at the start of the run.",
            )
            return None
        return entries

    def _read(self, simulator: Any) -> dict[str, Any]:
        """The entries of a reset."""
        observations, dones, infos = undecorated(simulator, "get_from_scenario")(
            get_observations=True, get_rewards=False, get_infos=True, get_dones=True
        )
        return self._entries(simulator, observations, None, dones, infos)

    def _entries(
        self, simulator: Any, observations: list, rewards: list | None, dones: Tensor, infos: list
    ) -> dict[str, Any]:
        """The entries of the data, by group; of agents that are alike, stacked to ``[num_envs, n_agents, ...]``."""
        terminated = dones.unsqueeze(-1)
        entries: dict[str, Any] = {"done": terminated, "terminated": terminated.clone()}
        if self._time_limit is not None:
            truncated = (simulator.steps >= self._time_limit).unsqueeze(-1)
            entries |= {"done": terminated | truncated, "truncated": truncated}
        for group, names in self.group_map.items():
            agents = [self.agent_names_to_indices_map[name] for name in names]
            of_agents: dict[str, list] = {"observation": [observations[agent] for agent in agents]}
            if rewards is not None:
                of_agents["reward"] = [rewards[agent] for agent in agents]
            info = [{name: value.float() for name, value in infos[agent].items()} for agent in agents]
            if all(info):
                of_agents["info"] = info
            entries[group] = of_agents if self.het_specs_map[group] else _stacked(of_agents)
        return entries

    def _wrap(self, entries: Mapping[str, Any]) -> TensorDictBase:
        """The entries as a TensorDict; VmasEnv makes one for each agent."""
        data: dict[str, Any] = {}
        for name, value in entries.items():
            if name not in self.group_map:
                data[name] = value
            elif self.het_specs_map[name]:
                data[name] = self._stack_lazily(value)
            else:
                data[name] = TensorDict(value, (*self.batch_size, len(self.group_map[name])), device=self.device)
        return TensorDict(data, batch_size=self.batch_size, device=self.device)

    def _stack_lazily(self, entries: Mapping[str, list]) -> TensorDictBase:
        """Stacks the entries of agents whose observations or actions differ, as TorchRL does."""
        agents = [
            TensorDict(
                {name: self.read_obs(value) for name, value in zip(entries, values, strict=True)}, self.batch_size
            )
            for values in zip(*entries.values(), strict=True)
        ]
        return LazyStackedTensorDict.maybe_dense_stack(agents, dim=1).to(self.device)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Makes the global generators this object's inside the context, for functions of VMAS that are undecorated."""
        local_seed = self.lib.simulator.environment.environment.local_seed
        with self._own_random_state(self._env), local_seed(self._env.vmas_random_state):
            yield

    @contextlib.contextmanager
    def _own_random_state(self, env: Any) -> Iterator[None]:
        """Makes VMAS draw from this object's generators inside the context."""
        shared = _generators(env)
        of_host = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        _set_generators(env, self._random_state)
        try:
            yield
        except BaseException:  # an error leaves VMAS's states in the global generators
            torch.set_rng_state(of_host[0])
            np.random.set_state(of_host[1])  # noqa: NPY002
            random.setstate(of_host[2])
            raise
        finally:
            self._random_state = _generators(env)
            _set_generators(env, shared)


def _stacked(entries: Mapping[str, list]) -> dict[str, Any]:
    """Stacks the entries of equal agents, lists of tensors or of dicts, to ``[num_envs, n_agents, ...]``."""
    stacked: dict[str, Any] = {}
    for name, values in entries.items():
        if isinstance(values[0], Tensor):
            value = torch.stack(values, 1)
            stacked[name] = value.unsqueeze(-1) if value.ndim == 2 else value
        else:
            common = [key for key in values[0] if all(key in other for other in values)]
            stacked[name] = _stacked({key: [value[key] for value in values] for key in common})
    return stacked


def undecorated(simulator: Any, method: str) -> Callable[..., Any]:
    """A method of VMAS's environment without the decorator that gives it VMAS's random numbers."""
    return functools.partial(inspect.unwrap(getattr(type(simulator), method)), simulator)


def _generators(env: Any) -> list[Any]:
    """The states that VMAS draws from: its list, one per process; on an accelerator also PyTorch's generator."""
    return [*env.vmas_random_state, *([] if env.device.type == "cpu" else [device_state(env.device)])]


def _set_generators(env: Any, states: list[Any]) -> None:
    env.vmas_random_state[:] = states[:3]
    for state in states[3:]:
        set_device_state(env.device, state)


def _draw_seed(states: list[Any]) -> int:
    """Draws a seed from VMAS's own generator."""
    generator = torch.Generator()
    generator.set_state(states[0])
    seed = int(torch.randint(2**31, (), generator=generator))
    states[0] = generator.get_state()
    return seed


@contextlib.contextmanager
def _unchanged(values: list[Any]) -> Iterator[None]:
    before = list(values)
    try:
        yield
    finally:
        values[:] = before


def _shared_tensors(env: Any, twin: Any) -> set[str]:
    """The paths of tensors whose first dimension has the number of environments by coincidence.

    ``twin`` is the same simulator with another number of environments.
    """
    sizes = {path: tensor.shape[:1] for path, tensor in tensors_in((twin.scenario, twin.world)).items()}
    tensors = tensors_in((env.scenario, env.world))
    batched = [path for path, tensor in tensors.items() if tensor.shape[:1] == (env.num_envs,)]
    return {path for path in batched if sizes.get(path, ()) not in {(), (twin.num_envs,)}}
