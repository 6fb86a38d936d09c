"""Checkpoints of a training run: what they hold, how they are found, and when a run may be continued."""

from __future__ import annotations

import importlib.metadata
import io
import math
import pickle
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor
from torchrl._utils import logger
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointRotation,
    StateDictCheckpointAdapter,
)
from torchrl.collectors import Collector

from torchrl_trpo.envs.normalization import TransformState
from torchrl_trpo.envs.object_graph import InexactError
from torchrl_trpo.errors import SettingError, nearest
from torchrl_trpo.parallel.ranks import Ranks, agreed
from torchrl_trpo.parallel.torchrun import job_id
from torchrl_trpo.reporting.record import flat
from torchrl_trpo.seeding import GlobalGenerators, rank_seed, seed_generators

FORMAT_VERSION = 1
"""Of what a checkpoint holds; newer ones are refused."""

WHICH = ("latest", "best")
"""The checkpoints of a run that have a name."""
_DIRECTORY = "checkpoints"
_PACKAGES = ("torchrl-trpo", "torch", "torchrl", "tensordict", "vmas", "mpe2", "gymnasium", "hydra-core")
_FIXED = (  # what a run cannot change on its way: its task, its networks and its random numbers
    "algorithm",
    "env.name",
    "env.factory",
    "env.kwargs",
    "env.num_envs",
    "env.max_steps",
    "env.continuous_actions",
    "normalize_observations",
    "actor.hidden",
    "actor.sharing",
    "actor.network",
    "critic.hidden",
    "critic.network",
    "critic.share_params",
    "critic.inputs",
    "critic.agent_one_hot",
    "critic.others_actions",
    "critic.value_norm",
    "seed",
)
_UNSAID = ("output_dir", "resume", "versions", "film", "checkpoint", "logger")  # a change of these changes no result


class Checkpoints:
    """The checkpoints of a run folder, on ``torchrl.checkpoint``.

    Each is a folder ``checkpoints/checkpoint-<iteration>``, written beside its place and then moved there: there is
    never half of one. Its components are files of ``torch.save``, read with ``weights_only=True``: loading one runs no
    code. Its manifest holds the format's version, the packages' versions, the config and the progress.

    Of several ranks the first one writes and reads, for all: only its machine needs the folder. Saving and loading are
    collective calls.

    Args:
        folder: the run's folder.
        collector: the run's collector: what it is about to continue, and its environment.
        components: the other objects with ``state_dict`` and ``load_state_dict``, by name.
        keep: how many of the last are kept; the one with the best return is kept besides.
        ranks: the processes of the run.
    """

    def __init__(
        self, folder: Path, collector: Collector, components: Mapping[str, Any], keep: int, ranks: Ranks
    ) -> None:
        self.folder = folder
        self._ranks = ranks
        self._collector = collector
        self._own = {"collection": CollectionState(collector), "generators": _Generators()}
        self._transforms = {"collection": TransformState(collector.env)}
        self._components = dict(components)
        self._others = _OtherRanks()
        directory = folder / _DIRECTORY
        self._rotation = CheckpointRotation(directory, keep_last=keep, keep_best=("best_metric", "max"))

    def save(self, progress: Mapping[str, Any], config: Mapping[str, Any], episode_return: float) -> Path:
        """Writes a checkpoint and removes those that are not kept.

        Args:
            progress: numbers such as ``iteration`` and ``frames``.
            config: the run's settings, with the algorithm and the packages' versions.
            episode_return: the return by which the best is told; one that is not finite counts as the worst.

        Returns:
            Where it is.
        """
        if self._ranks.size > 1:
            self._others.states = self._ranks.gather_objects(_as_bytes(_states(self._own)))[1:]
            if not self._ranks.is_first:
                return self.folder
        metric = episode_return if math.isfinite(episode_return) else -1e300  # the manifest wants a finite number
        record = {
            "format_version": FORMAT_VERSION,
            "progress": progress,
            "config": config,
            "best_metric": metric,
            "ranks": self._ranks.size,
            "job": job_id(),
        }
        checkpoint = _checkpoint_of({**self._own, **self._components, **self._of_others(self._ranks.size)})
        return self._rotation.save(checkpoint, step=progress["iteration"], metadata=record)

    def load(self, path: Path) -> dict[str, Any]:
        """Puts the state of a checkpoint back, all of it.

        A run that another number of processes goes on with begins new episodes, and this is said.

        Args:
            path: the checkpoint.

        Returns:
            The progress that it was saved with. A :class:`~torchrl_trpo.errors.SettingError` says if something in it
            is missing, or cannot be read.
        """
        progress, same_size = agreed(lambda: self._load_first(path), self._ranks)
        if self._ranks.size > 1:
            shared = self._components | self._transforms
            common = self._ranks.scatter_objects([_as_bytes(_states(shared))] * self._ranks.size)
            own = self._ranks.scatter_objects([None, *self._others.states] if same_size else [None] * self._ranks.size)
            if not self._ranks.is_first:
                _restore(shared, _from_bytes(common))
            if own is not None:
                _restore(self._own, _from_bytes(own))
        if not same_size:
            self._begin_episodes(progress)
        return progress

    def _begin_episodes(self, progress: Mapping[str, Any]) -> None:
        """New episodes, with random numbers that no iteration of the run has had."""
        seed = rank_seed(torch.initial_seed(), self._ranks.rank, progress["iteration"] + 1)
        seed_generators(seed)
        self._collector.env.set_seed(seed)
        self._collector.reset()

    def _load_first(self, path: Path) -> tuple[dict[str, Any], bool]:
        """Puts the first rank's state back; gives the progress, and whether it was saved by as many ranks."""
        record = read_record(path)
        before = record.get("ranks", 1)
        if before != self._ranks.size:
            logger.warning(
                f"The checkpoint is of {before} processes, and now there are {self._ranks.size}: the run begins new "
                "episodes, with new random numbers, and is not the same to the bit."
            )
            _load(_checkpoint_of(self._components | self._transforms), path)
            return record["progress"], False
        _load(_checkpoint_of({**self._own, **self._components, **self._of_others(before)}), path)
        return record["progress"], True

    def _of_others(self, size: int) -> dict[str, Any]:
        return {"other_ranks": self._others} if size > 1 else {}

    def clean(self) -> None:
        """Removes what writers that were killed have left."""
        for rest in self._rotation.directory.glob(".checkpoint-*"):
            Checkpoint._remove_path(rest)


class CollectionState:
    """What a collector is about to continue: the data of the last step, the transforms and the simulator.

    A simulator without ``get_extra_state`` has, as far as anyone can know, a state that is not saved, whatever buffers
    it has: it then begins new episodes, and this is said.

    Args:
        collector: the collector.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._told = self._checked = False

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain containers and tensors; an environment's own that holds anything else is refused."""
        env = self._collector.env
        try:
            simulator = env.base_env.state_dict()
        except InexactError as error:
            simulator = {}
            self._tell(f"The environment's state cannot be saved ({error}).")
        if not self._checked:
            _check_plain(simulator)
            self._checked = True
        return {
            "transforms": env.transform.state_dict(),
            "simulator": simulator if _has_extra_state(simulator) else {},
            "step": _packed(self._collector._carrier),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Puts the state back.

        Args:
            state_dict: what :meth:`state_dict` gave.
        """
        env = self._collector.env
        env.transform.load_state_dict(state_dict["transforms"])
        if state_dict["simulator"]:
            env.base_env.load_state_dict(state_dict["simulator"])
            self._collector._carrier = _unpacked(state_dict["step"], self._collector._carrier.device, env.device)
        else:
            self._tell("The checkpoint does not hold the environment's own state (it has no get_extra_state).")

    def _tell(self, why: str) -> None:
        if not self._told:
            logger.warning(f"{why} A resumed run begins new episodes, and is not the same to the bit.")
        self._told = True


class _OtherRanks:
    """What the other ranks are about to continue, for the first rank to keep."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The states of ranks 1 and above."""
        return {"states": self.states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keeps them, to be handed out."""
        self.states = list(state_dict["states"])


def find_checkpoint(folder: Path, which: str = "latest") -> Path:
    """A checkpoint of a run.

    Args:
        folder: the run's folder.
        which: ``"latest"``, or ``"best"``: the one with the highest episode return in its iteration.

    Returns:
        Where it is.

    Raises:
        SettingError: if there is none, or it cannot be read by this version.
    """
    if which not in WHICH:
        raise SettingError(f"checkpoint: {which!r}. {nearest(which, WHICH)}")
    found = sorted((folder / _DIRECTORY).glob("checkpoint-*"))
    if not found:
        raise SettingError(
            f"{str(folder)!r} has no checkpoint. Legal: the folder of a run, the one that holds metrics.csv and "
            "checkpoints. A run that was stopped before its first checkpoint begins anew."
        )
    if which == "latest":
        read_record(found[-1])
        return found[-1]
    return max(found, key=lambda path: (read_record(path)["best_metric"], path.name))


def load_components(path: Path, components: Mapping[str, Any]) -> None:
    """Puts the state of some components of a checkpoint back.

    Args:
        path: the checkpoint.
        components: objects with ``load_state_dict``, by name. A :class:`~torchrl_trpo.errors.SettingError` says if one
            is missing or cannot be read.
    """
    _load(_checkpoint_of(components), path)


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: ``format_version``, ``progress``, ``config``, ``best_metric``.

    Args:
        path: the checkpoint.

    Returns:
        The record.

    Raises:
        SettingError: if it is broken, or of another format.
    """
    try:
        record = Checkpoint.manifest(path)["metadata"]
        version = record["format_version"]
    except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(_unreadable(path, error)) from error
    if version != FORMAT_VERSION:
        written = record["config"]["versions"]["torchrl-trpo"]
        raise SettingError(
            f"the checkpoint {path} has format {version}, of torchrl-trpo {written}, and this is torchrl-trpo "
            f"{importlib.metadata.version('torchrl-trpo')}, which reads format {FORMAT_VERSION}. Use: pip install "
            f"torchrl-trpo=={written}."
        )
    return record


def full_record(cfg: DictConfig, algorithm: str) -> dict[str, Any]:
    """The settings of a run, resolved, with its algorithm and the versions of the packages.

    Args:
        cfg: the recipe's config.
        algorithm: the algorithm's name.

    Returns:
        The record, of plain containers.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**settings, "algorithm": algorithm, "versions": versions}


def check_continued(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Refuses to continue a run with another task, network or seed.

    Args:
        before: the record of the run that is continued.
        now: the record of this one.
        folder: the run's folder, for the message.

    Returns:
        The settings, by dotted name, that differ, and may.

    Raises:
        SettingError: if one differs that may not.
    """
    old, new = OmegaConf.create(dict(before)), OmegaConf.create(dict(now))
    for name in _FIXED:
        was, is_now = OmegaConf.select(old, name), OmegaConf.select(new, name)
        if was != is_now:
            advice = f"Use the recipe of {was}." if name == "algorithm" else f"Leave {name} out to continue it."
            raise SettingError(
                f"resume: the run in {str(folder)!r} has {name}={_plain(was)}, and now it is {_plain(is_now)}. {advice}"
            )
    versions = {n: (v, now["versions"].get(n)) for n, v in before["versions"].items() if now["versions"].get(n) != v}
    if versions:
        told = ", ".join(f"{name} {was} (now {is_now})" for name, (was, is_now) in versions.items())
        logger.warning(f"The run was made with {told}: what follows may differ from what it would have been.")
    changed = []
    for name in dict.fromkeys([*flat(before), *flat(now)]):
        was, is_now = OmegaConf.select(old, name), OmegaConf.select(new, name)
        if was != is_now and name.partition(".")[0] not in _UNSAID:
            logger.warning(f"{name} was {_plain(was)} until now, and is {_plain(is_now)} from here on.")
            changed.append(name)
    return changed


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _checkpoint_of(components: Mapping[str, Any]) -> Checkpoint:
    checkpoint = Checkpoint()
    for name, component in components.items():
        checkpoint.register(name, component, adapter=StateDictCheckpointAdapter("torch"))
    return checkpoint


def _states(components: Mapping[str, Any]) -> dict[str, Any]:
    return {name: component.state_dict() for name, component in components.items()}


def _restore(components: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    for name, component in components.items():
        component.load_state_dict(states[name])


def _as_bytes(state: Any) -> Tensor:
    """A state as it is sent to another machine, whose devices have other names."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)


def _load(checkpoint: Checkpoint, path: Path) -> None:
    try:
        checkpoint.load(path, map_location="cpu")
    except CheckpointError as error:
        raise SettingError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    others = [other for other in sorted(path.parent.glob("checkpoint-*")) if other.name < path.name]
    advice = f"Move it elsewhere to use the one before, {others[-1].name}." if others else "There is none before it."
    return f"the checkpoint {path} cannot be read ({str(error).splitlines()[0]}). {advice}"


def _has_extra_state(state: Any) -> bool:
    """Whether a ``state_dict`` has what a ``get_extra_state`` gave, in it or in that of a sub-environment."""
    if not isinstance(state, Mapping):
        return False
    own = any(str(key).endswith("_extra_state") and value is not None for key, value in state.items())
    return own or any(_has_extra_state(value) for value in state.values())


def _check_plain(state: Any) -> None:
    """Refuses an environment's state that ``weights_only`` would not read, before anything is trained."""
    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        raise SettingError(
            f"the environment's state_dict (get_extra_state) cannot be read again without running code: "
            f"{str(error).splitlines()[0]} Legal: tensors, numbers, text, and lists, tuples and dicts of them."
        ) from error


class _Generators(GlobalGenerators):
    """The process's generators; those of devices that are not there any more are left out, and this is said."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        there = dict(state_dict)
        for entry in [entry for entry in there if entry.startswith("torch_") and entry != "torch_cpu"]:
            kind, states = entry.removeprefix("torch_"), there[entry]
            if (1 if isinstance(states, Tensor) else len(states)) > _device_count(kind):
                del there[entry]
                logger.warning(
                    f"The checkpoint is of a machine with more devices of the kind {kind}: their random numbers are "
                    "not continued, and a resumed run is not the same to the bit."
                )
        super().load_state_dict(there)


def _device_count(kind: str) -> int:
    try:
        return torch.get_device_module(kind).device_count()
    except RuntimeError:  # this PyTorch does not know it
        return 0


def _packed(data: TensorDictBase) -> dict[str, Any]:
    """A TensorDict as plain dicts, which ``weights_only`` reads, with the batch sizes of what is nested."""
    if isinstance(data, LazyStackedTensorDict):
        return {"stack_dim": data.stack_dim, "parts": [_packed(part) for part in data.tensordicts]}
    entries = {name: _packed(value) if is_tensor_collection(value) else value.detach() for name, value in data.items()}
    return {"batch_size": list(data.batch_size), "entries": entries}


def _unpacked(packed: Mapping[str, Any], device: torch.device | None, tensors_on: torch.device) -> TensorDictBase:
    if "parts" in packed:
        parts = [_unpacked(part, device, tensors_on) for part in packed["parts"]]
        return LazyStackedTensorDict(*parts, stack_dim=packed["stack_dim"])
    entries = {
        name: value.to(tensors_on) if isinstance(value, torch.Tensor) else _unpacked(value, device, tensors_on)
        for name, value in packed["entries"].items()
    }
    return TensorDict(entries, packed["batch_size"], device=device)
