"""Checkpoints of a training run: writing, finding and reading them."""

from __future__ import annotations

import importlib.metadata
import io
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor
from torchrl._utils import logger
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation, StateDictCheckpointAdapter
from torchrl.collectors import Collector

from torchrl_trpo.envs.normalization import TransformState
from torchrl_trpo.errors import SettingError, nearest
from torchrl_trpo.parallel.ranks import Ranks, agreed
from torchrl_trpo.parallel.torchrun import job_id
from torchrl_trpo.seeding import GlobalGenerators, rank_seed, seed_generators
from torchrl_trpo.training.collection_state import CollectionState

FORMAT_VERSION = 1
"""The version of what a checkpoint holds; other versions are refused."""

WHICH = ("latest", "best")
"""The checkpoints of a run that can be asked for by name."""
_DIRECTORY = "checkpoints"


class Checkpoints:
    """The checkpoints of a run folder, on ``torchrl.checkpoint``.

    Each is a folder ``checkpoints/checkpoint-<iteration>``, which is written elsewhere and then moved to its place, so
    that it is always whole. Its components are files of ``torch.save``, read with ``weights_only=True``: loading runs
    no code of theirs. Its manifest holds the format's version, the packages' versions, the config and the progress.

    The first rank writes and reads for all ranks, and only its machine needs the folder. Saving and loading are
    collective calls.

    Args:
        folder: the run's folder.
        collector: the run's collector.
        components: the other objects with ``state_dict`` and ``load_state_dict``, by name.
        keep: how many of the last checkpoints are kept; the one with the best return is kept besides.
        ranks: the processes of the run.
    """

    def __init__(
        self, folder: Path, collector: Collector, components: Mapping[str, Any], keep: int, ranks: Ranks
    ) -> None:
        self.folder = folder
        self._ranks = ranks
        self._collector = collector
        self._collection = CollectionState(collector)
        self._of_this_rank = {"collection": self._collection, "generators": GlobalGenerators()}
        self._transforms = {"collection": TransformState(collector.env)}
        self._components = dict(components)
        self._other_ranks = _OtherRanks()
        self._all = self._of_this_rank | self._components
        if ranks.size > 1:
            self._all["other_ranks"] = self._other_ranks
        directory = folder / _DIRECTORY
        self._rotation = CheckpointRotation(directory, keep_last=keep, keep_best=("best_metric", "max"))

    def save(self, progress: Mapping[str, Any], config: Mapping[str, Any], episode_return: float) -> None:
        """Writes a checkpoint and removes those that are not kept.

        ``episode_return`` decides which checkpoint is the best; a non-finite one counts as the worst.
        """
        if self._ranks.size > 1:
            self._other_ranks.states = self._ranks.gather_objects(_pack(self._of_this_rank))[1:]
            if not self._ranks.is_first:
                return
        metric = episode_return if math.isfinite(episode_return) else -1e300  # the manifest needs a finite number
        record = {
            "format_version": FORMAT_VERSION,
            "progress": progress,
            "config": config,
            "best_metric": metric,
            "ranks": self._ranks.size,
            "job": job_id(),
        }
        self._rotation.save(_checkpoint_of(self._all), step=progress["iteration"], metadata=record)

    def load(self, path: Path) -> dict[str, Any]:
        """Restores all that a checkpoint holds, and returns the progress that it was saved with.

        If the number of processes has changed, or the simulator has no state, the run begins new episodes, and a
        warning says so. Raises SettingError if something is missing, or cannot be read.
        """
        progress, same_size = agreed(lambda: self._load_first(path), self._ranks)
        if self._ranks.size > 1:
            shared = self._components | self._transforms
            shared_state = self._ranks.scatter_objects([_pack(shared)] * self._ranks.size)
            states = [None, *self._other_ranks.states] if same_size else [None] * self._ranks.size
            own_state = self._ranks.scatter_objects(states)
            if not self._ranks.is_first:
                _unpack(shared_state, shared)
            if own_state is not None:
                _unpack(own_state, self._of_this_rank)
        if not same_size or self._collection.begins_anew:
            self._begin_episodes(progress)
        return progress

    def _begin_episodes(self, progress: Mapping[str, Any]) -> None:
        """Begins new episodes, with random numbers that no iteration of the run has had."""
        seed = rank_seed(torch.initial_seed(), self._ranks.rank, progress["iteration"] + 1)
        seed_generators(seed)
        self._collector.env.set_seed(seed)
        self._collector.reset()

    def _load_first(self, path: Path) -> tuple[dict[str, Any], bool]:
        """Restores the first rank; returns the progress, and whether the number of ranks is the same."""
        record = read_record(path)
        same_size = record["ranks"] == self._ranks.size
        if not same_size:
            logger.warning(
                f"The checkpoint is of {record['ranks']} processes, and now there are {self._ranks.size}: the run "
                "begins new episodes, with new random numbers, and is not the same to the bit."
            )
        load_components(path, self._all if same_size else self._components | self._transforms)
        return record["progress"], same_size


class _OtherRanks:
    """The states of ranks 1 and above, which the first rank keeps for them."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.states = list(state_dict["states"])


def has_checkpoint(folder: Path) -> bool:
    """Whether a run's folder holds a checkpoint, readable or not."""
    return bool(_checkpoint_paths(folder))


def find_checkpoint(folder: Path, which: str = "latest") -> Path:
    """The ``"latest"`` checkpoint of a run, or the ``"best"``: that with the highest episode return in its iteration.

    Raises SettingError if there is none, or if this version cannot read it.
    """
    if which not in WHICH:
        raise SettingError(f"checkpoint: {which!r}. {nearest(which, WHICH)}")
    found = _checkpoint_paths(folder)
    if not found:
        raise SettingError(
            f"{str(folder)!r} has no checkpoint. Legal: the folder of a run, the one that holds metrics.csv and "
            "checkpoints. A run that was stopped before its first checkpoint begins anew."
        )
    if which == "latest":
        read_record(found[-1])
        return found[-1]
    return max(found, key=lambda path: (read_record(path)["best_metric"], path.name))


def read_record(path: Path) -> dict[str, Any]:
    """A checkpoint's description: ``format_version``, ``progress``, ``config``, ``best_metric``.

    Raises SettingError if it is broken, or of another format.
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


def load_components(path: Path, components: Mapping[str, Any]) -> None:
    """Restores some components of a checkpoint, objects with ``load_state_dict`` by name.

    Raises SettingError if one is missing, cannot be read or has changed since it was written.
    """
    try:
        _checkpoint_of(components).load(path, map_location="cpu")
        for name in components:
            for file in path.glob(f"components/*-{name}/*.pt"):
                with ZipFile(file) as parts:
                    if changed := parts.testzip():  # torch.load compares no checksum
                        raise CheckpointError(f"{file} has changed since it was written, in {changed}")
    except (CheckpointError, BadZipFile) as error:
        raise SettingError(_unreadable(path, error)) from error


def remove_unfinished(folder: Path) -> None:
    """Removes the checkpoints that were being written when a process was killed."""
    for rest in (folder / _DIRECTORY).glob(".checkpoint-*"):
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


def _checkpoint_paths(folder: Path) -> list[Path]:
    return sorted((folder / _DIRECTORY).glob("checkpoint-*"))


def _checkpoint_of(components: Mapping[str, Any]) -> Checkpoint:
    checkpoint = Checkpoint()
    for name, component in components.items():
        checkpoint.register(name, component, adapter=StateDictCheckpointAdapter("torch"))
    return checkpoint


def _unreadable(path: Path, error: Exception) -> str:
    others = [other for other in sorted(path.parent.glob("checkpoint-*")) if other.name < path.name]
    advice = f"Move it elsewhere to use the one before, {others[-1].name}." if others else "There is none before it."
    return f"the checkpoint {path} cannot be read ({str(error).splitlines()[0]}). {advice}"


def _pack(components: Mapping[str, Any]) -> Tensor:
    """Encodes the states of components for another rank, whose devices may have other names."""
    file = io.BytesIO()
    torch.save({name: component.state_dict() for name, component in components.items()}, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def _unpack(packed: Tensor, components: Mapping[str, Any]) -> None:
    """Restores the states that :func:`_pack` encoded."""
    states = torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)
    for name, component in components.items():
        component.load_state_dict(states[name])
