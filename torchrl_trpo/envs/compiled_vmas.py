"""VMAS with a compiled simulator."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from torchrl_trpo.envs.attribute_reads import attribute_reads
from torchrl_trpo.envs.compiled import CompiledFunction
from torchrl_trpo.envs.flat_state import FlatState
from torchrl_trpo.envs.object_graph import changes_unseen, path_of, walk
from torchrl_trpo.envs.reset_pool import ResetPool
from torchrl_trpo.envs.saved_state import ObjectState
from torchrl_trpo.envs.snapshot import ObjectSnapshot
from torchrl_trpo.envs.tracing import Places, left_as_it_is
from torchrl_trpo.envs.vmas import BatchedResetVmasEnv, undecorated
from torchrl_trpo.errors import warn
from torchrl_trpo.kernels.buffers import NotCompiled, reason_of, unused_size

_RESET_TOGETHER = 2048  # which takes VMAS a few times as long as one environment
_STEPS_UNTIL_VARIANT, _STEPS_UNTIL_WARNING = 2, 3  # the first step of a simulator makes attributes
_MOST_VARIANTS = 12


class CompiledVmasEnv(BatchedResetVmasEnv):
    """TorchRL's ``VmasEnv`` with a simulator that is compiled when the environment is made.

    A step of VMAS is hundreds of small operations on tensors. Here they are one loop over the environments, which VMAS
    itself has written: it takes a step while PyTorch traces it, and a C++ compiler compiles the trace. The numbers are
    those of VMAS up to rounding. On a GPU the loop is a CUDA kernel, with a thread for each environment. Everything
    that VMAS decides by numbers is checked at each step. If it would decide otherwise, or if anything but tensors has
    changed in what it reads of its objects, VMAS takes the step, and raises its own errors. VMAS's objects hold the
    state at any time, and may be read and written as ever.

    If a reset of all environments draws what all share, such as the landmark that is the goal, the step is compiled
    once for each outcome, up to 12 of them. A Python float that has changed is an input of the next one.

    Environments that end are replaced by ones that VMAS has reset together beforehand, each of which is used once. If
    something that a reset reads is changed, they are reset by VMAS from then on.

    Globals and class attributes that a scenario reads are constants of the compiled code: change attributes of the
    scenario object instead.

    Changes must be seen: a scenario is not compiled if it holds generators of random numbers, iterators, or objects
    with ``__slots__`` that may change. Nor is it if it holds tensors that share memory which resets write to.

    Compiled code is kept in ``~/.cache/torchrl_trpo``, or in ``$TORCHRL_TRPO_CACHE``. A warning says so if a scenario
    cannot be compiled, and why; then the environment is a :class:`~torchrl_trpo.envs.vmas.BatchedResetVmasEnv`.

    Args:
        *args: as of :class:`~torchrl.envs.VmasEnv`.

    Keyword Args:
        **kwargs: as of :class:`~torchrl.envs.VmasEnv`.

    Attributes:
        why_not_compiled: why the step is not compiled; None if it is.

    Examples:
        >>> from torchrl_trpo.envs import CompiledVmasEnv
        >>> env = CompiledVmasEnv("simple", num_envs=32, max_steps=100, seed=0)
        >>> env.rollout(5).batch_size
        torch.Size([32, 5])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._made_with = kwargs
        self.compiled_step: CompiledFunction | None = None
        self.compiled_read: CompiledFunction | None = None
        self.pool: ResetPool | None = None
        self._variants: list[tuple[FlatState, CompiledFunction, CompiledFunction | None, ResetPool | None]] = []
        self._refilled: set[tuple[str, str]] = set()  # objects' paths and attributes: see _find_refilled
        self._before_reset: list[Any] | None = None  # the random numbers before the last reset of all environments
        self.n_left_to_vmas = 0  # steps in a row, because of a change in VMAS's objects
        self.why_not_compiled: str | None = None
        super().__init__(*args, **kwargs)
        self._compile_or_warn()

    def _compile_or_warn(self) -> None:
        try:
            self._compile()
        except NotCompiled as error:
            self.why_not_compiled = str(error)
            warn(f"{self.scenario_name} is stepped by VMAS, not compiled: {error}.")

    def _compile(self, numbers: Set[str] = frozenset()) -> None:
        env = self._env
        if env.grad_enabled:
            raise NotCompiled("gradients are to pass through it")
        for value, place, first in walk([("scenario", env.scenario), ("world", env.world)]):
            if first and changes_unseen(value):
                raise NotCompiled(f"{path_of(place)}, a {type(value).__name__}, may change unseen")
        drawn = list(self._random_state)
        try:
            with left_as_it_is(env):
                self._compile_from(drawn, numbers)
        finally:
            self._random_state = drawn

    def _compile_from(self, drawn: list[Any], numbers: Set[str]) -> None:
        """Compiles step and reset, with the simulator's random numbers as they are; ``drawn`` are their states.

        The attributes that ``numbers`` names may change.
        """
        env = self._env
        n_together = env.num_envs * max(1, _RESET_TOGETHER // env.num_envs)
        try:
            twin, spare = self._make_twins([unused_size(Places(env).tensors), n_together], drawn)
        except Exception as error:  # a tensor that a scenario is given may have rows for so many environments
            reason = f"its first steps fail, or those with another number of environments: {reason_of(error)}"
            raise NotCompiled(reason) from error
        with self._drawing():
            self._refilled = self._find_refilled(twin)
            state = FlatState(env, twin, numbers)
            step = CompiledFunction(state, twin, self._advance, _random_actions(twin))
            read = None
            with contextlib.suppress(NotCompiled):
                read = CompiledFunction(state, twin, self._read)  # the first call compiles both
            step.compare(lambda: _random_actions(env), self._advance)

        def reset() -> None:
            with self._drawing(), self._keeping(spare):
                undecorated(spare, "reset")(return_observations=False)

        def rewind() -> None:
            with self._drawing():
                self._advance(spare, *_random_actions(spare))
            self._random_state = list(drawn)

        pool = None
        if read is not None:
            with contextlib.suppress(NotCompiled):  # then environments are reset as ever
                with self._drawing():
                    read.compare(list, self._read)
                filled = ResetPool(state, spare, reset)
                self._random_state = list(drawn)
                filled.check(rewind)
                pool = filled
        state.check_memory(resets_are_noted=pool is not None)
        self.compiled_step, self.state = step, state
        self.compiled_read, self.pool = (None, None) if pool is None else (read, pool)
        self._variants.append((state, step, self.compiled_read, self.pool))

    def _make_twins(self, sizes: Sequence[int], drawn: list[Any]) -> list[Any]:
        """Simulators with other numbers of environments; they and this one take two steps, which make attributes."""
        with self._drawing():
            twins = [self._make_twin(self._env, n) for n in sizes]
        for twin in twins:
            self._random_state = list(self._before_reset or drawn)
            with self._drawing():
                if self._before_reset is not None:  # so that it draws the same for all environments
                    undecorated(twin, "reset")(return_observations=False)
        with self._drawing():
            for simulator in (self._env, *twins):
                for _ in range(2):
                    self._advance(simulator, *_random_actions(simulator))
        return twins

    def _find_variant(self) -> bool:
        """Whether there is a compiled step for what VMAS's objects hold now; it is used from here on."""
        for variant in self._variants:
            if variant[0].attach():
                self.state, self.compiled_step, self.compiled_read, self.pool = variant
                return True
        if len(self._variants) < _MOST_VARIANTS:
            numbers = self.state.numbers | self.state.reference.changed_numbers(Places(self._env))
            for each in (numbers, frozenset[str]()) if numbers else (frozenset[str](),):
                with contextlib.suppress(NotCompiled):
                    self._compile(each)
                    return True
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledVmasEnv:
        result: Any = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        # Compiled code knows where tensors are in memory: it is made anew.
        anew: dict[str, Any] = {"state": None, "compiled_step": None, "compiled_read": None, "pool": None}
        others = {name: value for name, value in self.__dict__.items() if name not in anew and name != "_variants"}
        result.__dict__.update(copy.deepcopy(others, memo), **anew, _variants=[])
        if self.compiled_step is not None:
            result._compile_or_warn()
        if self.pool is not None and result.pool is not None:
            result.pool.load_state_dict(copy.deepcopy(self.pool.state_dict()))
        return result

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        for *_, pool in self._variants:
            if pool is not None:
                pool.clear()

    def _reset_all(self) -> None:
        self._before_reset = list(self._random_state)
        with self._keeping(self._env):
            super()._reset_all()

    def _find_refilled(self, simulator: Any) -> set[tuple[str, str]]:
        """The containers that a reset empties, and that a step fills before anything reads them."""
        written, read = set[str](), set[str]()
        with left_as_it_is(simulator):
            with attribute_reads(Places(simulator).objects, read):
                undecorated(simulator, "reset")(return_observations=False)
                self._read(simulator)
            empty = Places(simulator)
            with attribute_reads(empty.objects, set(), written):
                self._advance(simulator, *_random_actions(simulator))
            changed = set(empty.paths) ^ set(Places(simulator).paths)
        written -= read
        found = [path.rpartition(".") for path in written if any(each.startswith(f"{path}.") for each in changed)]
        return {(path, name) for path, _, name in found}

    @contextlib.contextmanager
    def _keeping(self, simulator: Any) -> Iterator[None]:
        """Puts back containers that a reset empties; what is in them is never read."""
        objects = Places(simulator).objects if self._refilled else {}
        held = [(vars(objects[path]), name, vars(objects[path])[name]) for path, name in self._refilled]
        yield
        for attributes, name, value in held:
            attributes[name] = value

    def make_twin_env(self, num_envs: int) -> BatchedResetVmasEnv:
        """The same environment with another number of environments, which is not compiled."""
        settings = {**self._made_with, "num_envs": num_envs, "scenario": copy.deepcopy(self._arguments_of_twin[0])}
        return BatchedResetVmasEnv(**settings)

    def _call(self, compiled: CompiledFunction | None, *arguments: Tensor, rows: Tensor | None = None) -> Any:
        """The results of a compiled function, if there is one and it stands for the function now."""
        if compiled is None:
            return None
        with self._drawing() if compiled.draws else contextlib.nullcontext():
            return compiled(*arguments, rows=rows)

    def _take_step(self, actions: Sequence[Tensor]) -> dict[str, Any]:
        entries = self._call(self.compiled_step, *actions)
        if entries is not None:
            self.n_left_to_vmas = 0
            return entries
        if self.compiled_step is not None and self.state.problem is not None:
            self.n_left_to_vmas += 1
            if self.n_left_to_vmas == _STEPS_UNTIL_VARIANT and self._find_variant():
                return self._take_step(actions)
            if self.n_left_to_vmas == _STEPS_UNTIL_WARNING:
                warn(
                    f"{self.scenario_name}: VMAS takes the steps, and not the compiled simulator, because something "
                    f"in its objects has changed: {self.state.problem}.",
                )
        return super()._take_step(actions)

    def _reset_some(self, ended: Tensor) -> dict[str, Any]:
        if self.pool is None or not self.pool.take(ended):
            return super()._reset_some(ended)
        entries = self._call(self.compiled_read, rows=ended)
        return self.read_ended(ended) if entries is None else entries

    def read_ended(self, ended: Tensor) -> dict[str, Any]:
        """The entries of all environments, of which the ended ones, bool ``[num_envs]``, have been reset."""
        snapshot = ObjectSnapshot((self._env.scenario, self._env.world), self.num_envs, self._shared)
        with self._drawing():
            entries = self._read(self._env)
        snapshot.keep(~ended)  # computing observations may change the scenario
        return entries

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the simulator's state, as of the base class, and the environments that wait for others to end.

        Returns:
            The state, made of dicts, lists, tensors, numbers and strings.
        """
        variant = ObjectState({}, self._env.device).save(self._before_reset, self.n_left_to_vmas)
        pool = None if self.pool is None else self.pool.state_dict()
        return {**super().get_extra_state(), "variant": variant, "pool": pool}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state into the simulator, also one of a ``BatchedResetVmasEnv``.

        Args:
            state: from :meth:`get_extra_state`.
        """
        super().set_extra_state(state)
        if self._variants and "variant" in state:
            self._before_reset, self.n_left_to_vmas = ObjectState({}, self._env.device).load(state["variant"])
            if self.n_left_to_vmas == 0:
                self._find_variant()
        if self.pool is not None and state.get("pool") is not None:
            self.pool.load_state_dict(state["pool"])


def _random_actions(simulator: Any) -> list[Tensor]:
    """Random actions of the agents, ``[num_envs, action size]``."""
    draw = undecorated(simulator, "get_random_action")
    return [action.reshape(len(action), -1) for action in map(draw, simulator.agents)]
