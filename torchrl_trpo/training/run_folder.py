"""The folder of a training run: its lock, whether a run may begin or go on in it, and its small files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from torchrl_trpo.config.overrides import typed
from torchrl_trpo.errors import SettingError
from torchrl_trpo.parallel.torchrun import job_id
from torchrl_trpo.reporting.record import STATE, WARNINGS, read_config, read_json, read_rows, replace_file
from torchrl_trpo.training.checkpoints import find_checkpoint, has_checkpoint, read_record, remove_unfinished
from torchrl_trpo.training.continuation import check_continued, check_unfinished, rows_before


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
        checkpoint: the checkpoint that it continues; None for a new run.
        changed: the settings, by dotted name, that have changed since the checkpoint.
        rows: the rows of ``metrics.csv`` up to the checkpoint.
    """

    checkpoint: Path | None
    changed: list[str]
    rows: list[dict[str, str]]


class RunFolder:
    """The folder of a run. Only the first rank uses it.

    Args:
        path: where it is, or will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", timeout=0)

    def take(self, record: Mapping[str, Any]) -> Start:
        """Locks the folder for a run, and finds out where the run starts.

        A run goes on if ``resume`` asks for it, or if torchrun or a scheduler has started the same job again. Raises
        SettingError if the run may not use the folder.
        """
        try:
            if record["resume"] or self._belongs_to_this_job():
                return self._resume(record)
            self._begin()
        except OSError as error:
            name = "resume" if record["resume"] else "output_dir"
            raise SettingError(
                f"{name}: {str(self.path)!r} cannot be used ({error}). Legal: a folder that can be read and written."
            ) from error
        return Start(None, [], [])

    def release(self) -> None:
        """Unlocks the folder, if it is locked."""
        self._lock.release()

    def write_config(self, record: Mapping[str, Any]) -> None:
        """Writes ``config.yaml``."""
        replace_file(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(record))))

    def write_state(self, state: str, reason: str = "") -> None:
        """Writes whether the run goes on, or how it has ended, and why."""
        replace_file(self.path / STATE, json.dumps({"state": state, "reason": reason}) + "\n")

    def add_warning(self, iteration: int, text: str) -> None:
        """Appends a line to ``warnings.txt``."""
        with (self.path / WARNINGS).open("a", encoding="utf-8") as file:
            file.write(f"{iteration}: {text}\n")

    def _belongs_to_this_job(self) -> bool:
        if not has_checkpoint(self.path):
            return False
        job = read_record(find_checkpoint(self.path))["job"]
        return job is not None and job == job_id()

    def _begin(self) -> None:
        if has_checkpoint(self.path):
            raise SettingError(
                f"output_dir: {str(self.path)!r} holds a run already, which would be lost. Legal: another folder, or "
                f"{typed('resume', self.path)} to continue that run."
            )
        if (self.path / "config.yaml").exists():
            try:
                read_config(self.path, "output_dir")
            except SettingError as error:
                raise SettingError(f"{error} Or another folder.") from error
        state = self.path / STATE
        was_killed = state.exists() and read_json(state, "state")["state"] == "running"  # before its first checkpoint
        if (self.path / "summary.json").exists() or (read_rows(self.path / "metrics.csv") and not was_killed):
            raise SettingError(
                f"output_dir: {str(self.path)!r} holds a run without its checkpoints, which would be lost. Legal: "
                "another folder, or to move its files away."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()

    def _resume(self, now: Mapping[str, Any]) -> Start:
        checkpoint = find_checkpoint(self.path)
        before = read_record(checkpoint)
        iteration = before["progress"]["iteration"]
        changed = check_continued(before["config"], now, self.path)
        self._acquire()
        check_unfinished(self.path, before["progress"]["frames"], now)
        rows = rows_before(self.path / "metrics.csv", iteration)
        self._drop_warnings_after(iteration)
        return Start(checkpoint, changed, rows)

    def _acquire(self) -> None:
        """Keeps other processes out until :meth:`release` or the end of this process."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise SettingError(
                f"the run in {str(self.path)!r} is going on in another process. Legal: another folder, or to wait."
            ) from error
        remove_unfinished(self.path)

    def _drop_warnings_after(self, iteration: int) -> None:
        """Removes the warnings of iterations that will be done again."""
        if (path := self.path / WARNINGS).exists():
            try:
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                replace_file(path, "".join(line for line in lines if int(line.partition(":")[0]) <= iteration))
            except ValueError as error:
                raise SettingError(
                    f"resume: {path} cannot be read ({error}). Legal: lines that begin with the number of an iteration "
                    "and a colon. Put it back as it was, or move it away."
                ) from error
