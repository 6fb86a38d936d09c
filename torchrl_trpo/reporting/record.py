"""Reading the folder of a run: its settings, metrics and state, while it is written and afterwards."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrl_trpo.errors import SettingError, warn

STATE, WARNINGS = "state.json", "warnings.txt"
"""The files with a run's state and with its warnings."""
_SILENT_S = 60.0
_SILENT_ITERATIONS = 10
"""A running run that has written nothing for as many seconds, and as many of its iterations, is silent."""
_OF_EVERY_RUN = ("algorithm", "seed", "env.name", "train.total_frames", "updater")
_PUT_BACK = "Put it back as it was, or move it away to begin anew."


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder.

    Attributes:
        folder: the folder.
        config: the run's settings, as in its ``config.yaml``.
        columns: the columns of ``metrics.csv``, without a row that is being written; NaN where a cell is empty.
        state: ``"running"``, ``"silent"`` (it has written nothing for long, and was perhaps killed), ``"finished"``,
            ``"stopped"`` (by a signal), ``"failed"``, or ``"unfinished"`` if the folder does not tell which.
        reason: why a run was stopped or failed, or how long it has been silent.
    """

    folder: Path
    config: Mapping[str, Any]
    columns: Mapping[str, list[float]]
    state: str
    reason: str

    @property
    def title(self) -> str:
        """The algorithm, the environment and the seed."""
        return f"{self.config['algorithm']} on {self.config['env']['name']}, seed {self.config['seed']}"

    @property
    def max_kl(self) -> float | None:
        """The trust region's radius in nats; None for an algorithm without one."""
        return self.config["updater"].get("max_kl")

    @property
    def total_frames(self) -> int:
        """The frames that the run is meant to do."""
        return int(self.config["train"]["total_frames"])

    @property
    def frames(self) -> int:
        """The frames that the run has done."""
        return int(self.column("frames")[-1]) if self.column("frames") else 0

    def column(self, name: str) -> list[float]:
        """A column of the metrics.

        Args:
            name: its name.

        Returns:
            A number for each row; all NaN if the file has no such column.
        """
        rows = len(self.columns.get("iteration", []))
        return list(self.columns.get(name, [math.nan] * rows))

    def recent(self, name: str, rows: int = 5) -> float:
        """The mean of a column over the last rows.

        Args:
            name: the column.
            rows: the number of rows.

        Returns:
            The mean of the finite numbers; NaN if there is none.
        """
        return finite_mean(self.column(name)[-rows:])

    @property
    def episode_return(self) -> float:
        """The mean return of the last five iterations with finished episodes, as in ``summary.json``, or -inf."""
        return mean([value for value in self.column("episode_return") if not math.isnan(value)][-5:])


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside another, which it replaces in one step when the block has ended.

    A reader sees the old file or the new one, whenever the process is killed or the power fails. After an error it is
    the old one.

    Args:
        path: the file to replace.

    Yields:
        The file to write, with the same suffix.
    """
    beside = path.with_name(f".new_{path.name}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # else the name may be on the disk before what it is of
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_file(path: Path, text: str) -> None:
    """Writes a file in one step, see :func:`replacing`.

    Args:
        path: the file.
        text: what it holds.
    """
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8", newline="")


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested settings.

    Args:
        settings: the settings.

    Returns:
        The values by dotted name; an empty section counts as a value.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = flat(value) if isinstance(value, Mapping) and value else None
        found |= {name: value} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return found


def finite_mean(values: list[float]) -> float:
    """The mean of the finite values.

    Args:
        values: the values.

    Returns:
        The mean; NaN if no value is finite.
    """
    return mean([value for value in values if math.isfinite(value)])


def mean(values: Sequence[float]) -> float:
    """The mean of values.

    Args:
        values: the values.

    Returns:
        The mean; NaN of none.
    """
    return sum(values) / len(values) if values else math.nan


def read_rows(table: Path, column: str = "iteration", kind: type[int | float] = int) -> list[dict[str, str]]:
    """Reads the rows of a table such as ``metrics.csv``, without a last one that is only half written.

    Args:
        table: the file; a missing one has no rows.
        column: a column that has a number in each row.
        kind: the type of this number.

    Returns:
        The cells by column.

    Raises:
        SettingError: if it is not such a table: it is empty, has no such column, or a line that is not a row.
    """
    if not table.exists():
        return []
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows: list[dict[Any, Any]] = list(reader)
            names = reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise SettingError(f"{table} cannot be read ({error}). Legal: a CSV file in UTF-8. {_PUT_BACK}") from error
    if column not in names:
        raise SettingError(
            f"{table} has no column {column!r}: its first line is {','.join(names)!r}. Legal: a "
            f"header with commas between the columns. {_PUT_BACK}"
        )
    whole = [None not in row and None not in row.values() and _is_number(row[column], kind) for row in rows]
    if not all(whole[:-1]):
        raise SettingError(
            f"row {whole.index(False) + 1} of {table} is damaged. Legal: a cell for each column, a number in "
            f"{column!r}. {_PUT_BACK}"
        )
    return [row for row, is_whole in zip(rows, whole, strict=True) if is_whole]


def _is_number(text: str, kind: type[int | float]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file in one step.

    Args:
        path: the file.
        columns: its columns.
        rows: the rows by column; a missing number and a NaN are empty cells.
    """
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)


def cell(value: Any) -> Any:
    """What a cell of a CSV file holds.

    Args:
        value: the value.

    Returns:
        The value; an empty text for a NaN.
    """
    return "" if isinstance(value, float) and math.isnan(value) else value


def read_run(folder: Path) -> RunRecord:
    """Reads a run's folder.

    Args:
        folder: the folder.

    Returns:
        Its contents.

    Raises:
        SettingError: if it is not the folder of a run, or one of its files is damaged.
    """
    config = read_config(folder)
    rows = read_rows(folder / "metrics.csv")
    names = rows[0] if rows else {}
    try:
        columns = {name: [float(row[name] or "nan") for row in rows] for name in names}
    except ValueError as error:
        raise SettingError(f"{folder / 'metrics.csv'}: {error}. Legal: numbers. {_PUT_BACK}") from error
    state, reason = _state(folder, columns)
    return RunRecord(folder, config, columns, state, reason)


def read_config(folder: Path, name: str = "folder") -> dict[str, Any]:
    """Reads the ``config.yaml`` of a run.

    Args:
        folder: the run's folder.
        name: the setting that names the folder, for errors.

    Returns:
        The settings.

    Raises:
        SettingError: if there is none, or it is damaged or of something else.
    """
    from omegaconf import OmegaConf  # here, so that an evaluation does not need it

    path = folder / "config.yaml"
    if not path.exists():
        raise SettingError(f"{name}: {str(folder)!r} has no config.yaml. Legal: the folder of a run, which has one.")
    try:
        config = OmegaConf.load(path)
        missing = [each for each in _OF_EVERY_RUN if OmegaConf.select(config, each) is None]
        settings: Any = OmegaConf.to_container(config)
        if not missing:
            return dict(settings)
        problem = f"it has no {missing[0]!r}"
    except Exception as error:  # of YAML, of OmegaConf, or of the file
        problem = str(error).splitlines()[0]
    raise SettingError(f"{name}: {path} is not the config.yaml of a run: {problem}. Legal: the file as it was written.")


def read_json(path: Path, *names: str) -> dict[str, Any]:
    """Reads a JSON file of a run.

    Args:
        path: the file.
        *names: what it must have.

    Returns:
        What it holds.

    Raises:
        SettingError: if it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        problem = "".join(f"it has no {name!r}" for name in names if name not in found)
    except (ValueError, TypeError) as error:
        problem = str(error)
    if problem:
        raise SettingError(f"{path} cannot be read: {problem}. Legal: the file that the run wrote.")
    return found


def find_runs(folder: Path) -> Iterator[Path]:
    """Finds the folders of runs, such as those of a sweep.

    Args:
        folder: where to look, at any depth; it may be a run's itself.

    Yields:
        The folders, in natural order: 2 before 10. A folder whose ``config.yaml`` is not a run's is left out, with a
        warning.
    """
    found = [path.parent for path in folder.rglob("config.yaml") if (path.parent / "metrics.csv").exists()]
    for path in sorted(found, key=_natural):
        try:
            read_config(path)
        except SettingError as error:
            warn(f"Left out, since it is no run: {error}")
        else:
            yield path


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def _state(folder: Path, columns: Mapping[str, list[float]]) -> tuple[str, str]:
    if not (folder / STATE).exists():  # the run has not begun yet, or the disk was full
        return "unfinished", ""
    written = read_json(folder / STATE, "state", "reason")
    if written["state"] == "running":
        walls = columns.get("wall_s", [])
        per_iteration = walls[-1] / len(walls) if walls else 0.0
        age = time.time() - max((folder / name).stat().st_mtime for name in ("metrics.csv", STATE))
        if age > max(_SILENT_S, _SILENT_ITERATIONS * per_iteration):
            return "silent", f"nothing new for {age:.0f} s"
    return written["state"], written["reason"]
