"""Faults that are named: environments that fail or break their specs, and numbers that are not finite."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, NonTensor
from torchrl.envs import EnvBase, ParallelEnv

from torchrl_trpo.keys import GroupKeys, group_of, next_key, path


class EnvironmentFault(RuntimeError):
    """An environment failed, or gave what its specs do not say.

    Args:
        message: what happened, with all of the below.
        env_index: which environment of the batch; None if all are stepped at once.
        step: how many steps the environment object was asked for since it was made: the step that failed, or the last
            one before a reset that failed. Steps that are replayed do not count.
        key: the entry that is wrong, if that is what happened.
    """

    def __init__(
        self, message: str, env_index: int | None = None, step: int | None = None, key: NestedKey | None = None
    ) -> None:
        super().__init__(message)
        self.env_index = env_index
        self.step = step
        self.key = key


# ------------------------------------------------------------------ environments


def guard(env: EnvBase, num_envs: int, index: int | None = None) -> EnvBase:
    """Makes an environment name its faults: from then on they are an :class:`EnvironmentFault`.

    What a step, a reset or ``load_state_dict`` raises is named, and the fault's cause. Observations, rewards and ends
    are compared with the specs, by shape and dtype; an observation or reward that is missing is a fault, too. Entries
    whose size the spec leaves open, and groups whose agents differ, which TorchRL stacks lazily, are not compared.

    Args:
        env: the environment, of any class. It is changed in place: its class becomes a subclass of what it was.
        num_envs: the number of environments in the batch.
        index: which of them it is; None if it is all of them.

    Returns:
        The same environment.
    """
    return _guard(env, _Guard(num_envs, index))


def make_guarded(
    make: Callable[[], EnvBase], num_envs: int, index: int, reports: tuple[Connection, int] | None = None
) -> EnvBase:
    """Makes one environment of a batch, which names its faults.

    Args:
        make: makes the environment.
        num_envs: the number of environments in the batch.
        index: which of them it is.
        reports: where faults are sent, and the process that reads them: in another one they end the process.

    Returns:
        The environment.
    """
    guard = _Guard(num_envs, index, reports)
    if guard.reports is not None:  # Ctrl-C goes to all processes; it is for the first one to end the others
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with guard.naming("construction"):
        return _guard(make(), guard)


class _Expected(NamedTuple):
    """What a step or a reset gives: shape and dtype by name, for groups one of these; and which must be there."""

    entries: dict[str, Any]
    required: frozenset[str]


class _Guard:
    """What an environment needs to name its faults."""

    def __init__(self, num_envs: int, index: int | None, reports: tuple[Connection, int] | None = None) -> None:
        self.num_envs = num_envs
        self.index = index
        self.step = 0
        self.reports = reports[0] if reports is not None and reports[1] != os.getpid() else None

    def read_specs(self, env: EnvBase) -> None:
        observation, done = env.full_observation_spec, env.full_done_spec
        self.of_reset = _expected(observation, {}, done)
        self.of_step = _expected(observation, env.full_reward_spec, done)

    def fault(self, what: str, key: NestedKey | None = None) -> EnvironmentFault:
        return EnvironmentFault(
            f"{_who(self.num_envs, self.index)}, step {self.step}: {what}", self.index, self.step, key
        )

    @contextlib.contextmanager
    def naming(self, action: str, given: TensorDictBase | None = None) -> Iterator[None]:
        """Names what is raised inside; in a process of its own, reports it and ends the process."""
        try:
            yield
        except Exception as error:
            fault = error
            if not isinstance(error, EnvironmentFault):
                fault = self._raised(f"its {action} raised {type(error).__name__}: {error}".removesuffix(": "), given)
                fault.__cause__ = error
            if self.reports is None:
                raise fault from fault.__cause__
            self.reports.send(ExceptionWithTraceback(fault, fault.__traceback__))
            raise SystemExit(1) from fault

    def _raised(self, what: str, given: TensorDictBase | None) -> EnvironmentFault:
        """An error's fault; many simulators raise at an action that is NaN, since an observation was."""
        found = None if given is None else _first_non_finite(given)
        if found is None:
            return self.fault(what)
        row, key = found
        index = row if self.index is None else self.index
        fault = self.fault(f"{what}. Before it, {key!r} of environment {index} is not finite", key)
        fault.env_index = index
        return fault

    def check(self, data: Mapping[str, Any], expected: _Expected, action: str, group: tuple[str, ...] = ()) -> None:
        seen = 0
        for name, value in data.items():
            entry = expected.entries.get(name)
            if entry is None:
                continue
            seen += name in expected.required
            if type(entry) is _Expected:
                self.check(value, entry, action, (*group, name))
            elif value.shape != entry[0] or value.dtype != entry[1]:
                self._complain(action, (*group, name), _described(value.shape, value.dtype), entry)
        if seen < len(expected.required):
            missing = next(name for name in expected.entries if name in expected.required - set(data.keys()))
            if type(expected.entries[missing]) is _Expected:
                self.check({}, expected.entries[missing], action, (*group, missing))
            self._complain(action, (*group, missing), "nothing", expected.entries[missing])

    def _complain(self, action: str, key: tuple[str, ...], given: str, entry: Any) -> None:
        name = key[0] if len(key) == 1 else key
        raise self.fault(f"its {action} gave {given} for {name!r}, its spec says {_described(*entry)}.", name)


def _guard(env: EnvBase, guard: _Guard) -> EnvBase:
    guard.read_specs(env)
    env._guard = guard
    cls: Any = type(env)
    env.__class__ = _guarded(cls)
    return env


class _Guarded(EnvBase):
    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        guard = self._guard
        guard.step += 1
        with guard.naming("step", tensordict):
            data = super()._step(tensordict)
            guard.check(data, guard.of_step, "step")
        return data

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        guard = self._guard
        with guard.naming("reset"):
            data = super()._reset(tensordict, **kwargs)
            guard.check(data, guard.of_reset, "reset")
        return data

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self._guard.naming("load_state_dict"):
            return super().load_state_dict(*args, **kwargs)


@functools.cache
def _guarded(cls: Any) -> Any:
    """A class of the same name and metaclass, with which an instance can go on."""
    return type(cls)(cls.__name__, (_Guarded, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _expected(*specs: Mapping[str, Any]) -> _Expected:
    """What specs say; the last is of entries that may be left out, which TorchRL completes: the ends."""
    entries: dict[str, Any] = {}
    required: set[str] = set()
    names = dict.fromkeys(name for spec in specs for name in spec.keys())
    for name in names:
        found = [spec[name] if name in spec.keys() else {} for spec in specs]
        (first, *_) = [spec for spec in found if not isinstance(spec, dict)]
        if isinstance(first, Composite):
            if type(first) is not Composite:  # a lazy stack, of agents that differ
                continue
            entries[name] = _expected(*found)
            needed = bool(entries[name].required)
        elif isinstance(first, NonTensor) or -1 in first.shape:
            continue
        else:
            entries[name] = (first.shape, first.dtype)
            needed = any(not isinstance(spec, dict) for spec in found[:-1])
        if needed:
            required.add(name)
    return _Expected(entries, frozenset(required))


def _who(num_envs: int, index: int | None) -> str:
    return f"All {num_envs} environments" if index is None else f"Environment {index} of {num_envs}"


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


class NamedFaultsParallelEnv(ParallelEnv):
    """TorchRL's ``ParallelEnv`` of environments that name their faults: the fault arrives here, and all processes end.

    Where a process ends without a fault, killed by the system for memory or crashed in a library, that is the fault.
    ``load_state_dict`` waits for as long as it takes; ``ParallelEnv``'s goes on after ten seconds, and leaves behind a
    sign of a step done that makes the next step give what the one before gave.

    Args:
        num_workers: the number of environments.
        make: makes one.

    Keyword Args:
        **kwargs: as of ``ParallelEnv``.
    """

    def __init__(self, num_workers: int, make: Callable[[], EnvBase], **kwargs: Any) -> None:
        pipes = [Pipe(duplex=False) for _ in range(num_workers)]
        self._reports = [reader for reader, _ in pipes]
        self._processes: list[Any] = []
        self._ended: dict[int, int] = {}
        self._n_steps = 0
        super().__init__(
            num_workers,
            functools.partial(make_guarded, make, num_workers),
            create_env_kwargs=[{"index": i, "reports": (writer, os.getpid())} for i, (_, writer) in enumerate(pipes)],
            **kwargs,
        )

    def _start_workers(self) -> None:
        self._processes, self._ended = [], {}
        with self._faults_of_workers():
            super()._start_workers()
            self._processes = list(self._workers)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._n_steps += 1
        with self._faults_of_workers():
            return super()._step(tensordict)

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """See TorchRL."""
        self._n_steps += bool(self._use_buffers)  # otherwise _step is called
        with self._faults_of_workers():
            return super().step_and_maybe_reset(tensordict)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        with self._faults_of_workers():
            return super()._reset(tensordict, **kwargs)

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """See TorchRL."""
        with self._faults_of_workers():
            return super().set_seed(seed, static_seed)

    def state_dict(self) -> dict[str, Any]:
        """See TorchRL."""
        with self._faults_of_workers():
            return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], **kwargs: Any) -> None:
        """See TorchRL; returns when all environments are restored."""
        if self.is_closed:
            self.start()
        with self._faults_of_workers():
            for index, channel in enumerate(self.parent_channels):
                channel.send(("load_state_dict", state_dict.get(f"worker{index}", state_dict)))
            for index, (event, process) in enumerate(zip(self._events, self._workers, strict=True)):
                while not event.wait(0.1):
                    if not process.is_alive():
                        raise EOFError
                event.clear()
                self._shm_done_flags[index] = 0

    def _shutdown_workers(self) -> None:
        self._note_ended()
        super()._shutdown_workers()

    def _note_ended(self) -> None:
        for index, process in enumerate(self._processes):
            if not process._closed and not process.is_alive():
                self._ended.setdefault(index, process.exitcode)

    @contextlib.contextmanager
    def _faults_of_workers(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            if isinstance(error, (EOFError, OSError)):  # a pipe closes a little before its process has ended
                wait([process.sentinel for process in self._processes if not process._closed], timeout=1.0)
            self._note_ended()
            fault = self._fault()
            if fault is None:
                raise
            with contextlib.suppress(Exception):
                self.close(raise_if_closed=False)
            self._terminate_and_join_workers([process for process in self._processes if not process._closed], 2.0)
            self.is_closed = True
            raise fault from fault.__cause__ or error

    def _fault(self) -> Exception | None:
        for reader in self._reports:
            if reader.poll():
                return reader.recv()
        if not self._ended:
            return None
        # those that TorchRL ended because of it are ended by SIGTERM
        index, code = min(self._ended.items(), key=lambda ended: ended[1] == -signal.SIGTERM)
        who = _who(self.num_workers, index)
        return EnvironmentFault(f"{who}, step {self._n_steps}: {_ending(code)}", index, self._n_steps)


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}."
    return (
        f"its process was ended by {signal.Signals(-code).name}. The system does so when memory is short (SIGKILL) and "
        "when a library crashes (SIGSEGV, SIGABRT)."
    )


# ------------------------------------------------------------------ numbers


class NonFinite(NamedTuple):
    """Where a batch is not finite.

    Attributes:
        env_index: the environment.
        step: the step within the batch.
        key: the entry.
        total: how many numbers of the batch are not finite, in all entries that count.
    """

    env_index: int
    step: int
    key: NestedKey
    total: int


def find_non_finite(data: TensorDictBase, groups: Sequence[GroupKeys]) -> NonFinite | None:
    """The first number in a batch that is NaN or infinite.

    Looked at are, of all groups, what is floating point of the observations, the global ``"state"`` if there is one,
    the actions, their log-probabilities, the rewards and the next observations. What absent agents have, where the
    environment has a mask, does not count; whether an agent is there for the reward is as of the step, and for the next
    observation as of the next. First is the earliest step, in it the first environment, and of that the first entry in
    the order above.

    Where all is finite, there is one read from the device.

    Args:
        data: the batch, ``[num_envs, T]``.
        groups: the keys of the groups.

    Returns:
        Where it is, or None.
    """
    entries = _floating(data, groups)
    if not entries or bool(torch.stack([_finite(value, mask).all() for _, value, mask in entries]).all()):
        return None
    wrong = [~_finite(value, mask).flatten(2) for _, value, mask in entries]  # each [num_envs, T, ...]
    rows = torch.stack([value.any(-1) for value in wrong], -1)  # [num_envs, T, entries]
    step, env_index, entry = rows.transpose(0, 1).nonzero()[0].tolist()
    return NonFinite(env_index, step, entries[entry][0], sum(int(value.sum()) for value in wrong))


def _floating(data: TensorDictBase, groups: Sequence[GroupKeys]) -> list[tuple[NestedKey, Tensor, Tensor | None]]:
    """The entries to look at, each with the mask of its agents."""
    masks: dict[NestedKey, NestedKey | None] = {keys.observation: keys.mask for keys in groups}
    masks["state"] = None
    masks |= {key: keys.mask for keys in groups for key in (keys.action, keys.log_prob)}
    masks |= {next_key(keys.reward): keys.mask if group_of(keys.reward) else None for keys in groups}
    masks |= {next_key(keys.observation): None if keys.mask is None else next_key(keys.mask) for keys in groups}
    masks[next_key("state")] = None
    entries = []
    for key, mask in masks.items():
        value = data.get(key, None)
        if value is not None and value.is_floating_point():
            entries.append((key, value, None if mask is None else data.get(mask)))
    return entries


def _first_non_finite(data: TensorDictBase) -> tuple[int, NestedKey] | None:
    """The first row and entry of a step's inputs that is not finite: an observation, or else an action."""
    floating = {key: value for key, value in data.items(True, True) if value.is_floating_point()}
    for key in sorted(floating, key=lambda key: path(key)[-1] != "observation"):
        rows = ~floating[key].isfinite().reshape(data.numel(), -1).all(-1)
        if rows.any():
            return int(rows.nonzero()[0]), key
    return None


def _finite(value: Tensor, mask: Tensor | None) -> Tensor:
    finite = value.isfinite()
    return finite if mask is None else finite | ~mask.reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))
