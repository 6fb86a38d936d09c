"""TorchRL's loggers, for the metrics of a run: CSV, TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrl_trpo.errors import SettingError, nearest
from torchrl_trpo.reporting.record import flat
from torchrl_trpo.seeding import untouched_generators

if TYPE_CHECKING:
    from torchrl.record.loggers import Logger

BACKENDS: Mapping[str, tuple[str, Sequence[str]]] = {
    "csv": ("CSVLogger", ()),
    "tensorboard": ("TensorboardLogger", ("tensorboard",)),
    "wandb": ("WandbLogger", ("wandb",)),
    "mlflow": ("MLFlowLogger", ("mlflow", "sqlalchemy", "alembic")),
}
"""For each name the class in ``torchrl.record.loggers``, and the modules it needs."""
_IDENTITY = "logger.json"
"""The file in the run's folder that says which record is the run's."""
_MLFLOW_RUN_ID = "MLFLOW_RUN_ID"
"""The variable by which ``mlflow.start_run`` continues a run."""


class RunLogger:
    """Sends what a run measures to one of TorchRL's loggers; with None as the backend, nowhere.

    The backend's package is imported when this is opened, and no global random number is drawn.

    Args:
        backend: ``"csv"``, ``"tensorboard"``, ``"wandb"``, ``"mlflow"`` or None.
        kwargs: what TorchRL's logger is made with, beside what it is given here.
        folder: the run's folder: CSV and TensorBoard write into it.
        name: the run's name, for W&B and MLflow.
        frames: the frames done so far. If there are any, the record that the folder names is continued.

    Attributes:
        continues: whether it is.
    """

    def __init__(
        self, backend: str | None, kwargs: Mapping[str, Any], *, folder: Path, name: str, frames: int = 0
    ) -> None:
        self._backend = backend
        self._logger: Logger | None = None
        self.continues = False
        if backend is None:
            return
        identity = folder / _IDENTITY
        before = json.loads(identity.read_text()) if frames and identity.exists() else {}
        before = before if before.get("backend") == backend else {}
        self.continues = bool(before)
        with untouched_generators():
            self._logger = _open(backend, dict(kwargs), folder, name, before.get("id"))
            if before and backend in {"csv", "tensorboard"}:
                _forget_later(self._logger, backend, frames)
            identity.write_text(json.dumps({"backend": backend, "id": _run_id(self._logger, backend)}) + "\n")

    def log_settings(self, record: Mapping[str, Any]) -> None:
        """Logs the settings of a run that begins; one that is continued has them.

        Args:
            record: the settings, as in ``config.yaml``.
        """
        if self._logger is None or self.continues:
            return
        plain = {name: value if _is_plain(value) else str(value) for name, value in flat(record).items()}
        with untouched_generators():
            self._logger.log_hparams(plain)

    def log(self, metrics: Mapping[str, float], frames: int) -> None:
        """Logs numbers; those that are NaN are left out.

        Args:
            metrics: the numbers by name.
            frames: the step.
        """
        if self._logger is None:
            return
        with untouched_generators():
            self._logger.log_metrics({name: v for name, v in metrics.items() if not math.isnan(v)}, step=frames)

    def log_film(self, path: Path, frames: int) -> None:
        """Logs a film, as a video where the backend shows one; the CSV logger's stays where it is.

        Args:
            path: the film, an ``.mp4`` file.
            frames: the step.
        """
        if self._logger is None:
            return
        with untouched_generators():
            if self._backend == "tensorboard":
                _add_animation(self._logger.experiment, path, frames)
            elif self._backend == "wandb":
                video = importlib.import_module("wandb").Video(str(path), format="mp4")
                self._logger.experiment.log({"film": video, "step": frames})
            elif self._backend == "mlflow":
                importlib.import_module("mlflow").log_artifact(str(path), "videos")

    def close(self, *, failed: bool = False) -> None:
        """Ends the record; a run that is resumed opens it again.

        Args:
            failed: whether an error has ended the run.
        """
        if self._logger is None:
            return
        with untouched_generators():
            if self._backend == "wandb":
                self._logger.experiment.finish(exit_code=int(failed))
            elif self._backend == "mlflow":
                importlib.import_module("mlflow").end_run("FAILED" if failed else "FINISHED")
            elif self._backend == "tensorboard":
                self._logger.shutdown()
            else:
                _close_files(self._logger)
        self._logger = None


def logger_problem(backend: str | None, kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with the settings of a logger.

    Args:
        backend: the backend's name.
        kwargs: what its logger is made with.

    Returns:
        The message, or None.
    """
    if backend is None:
        return "logger.kwargs with logger.backend=null: nobody reads them. Legal: {}." if kwargs else None
    missing = [module for module in BACKENDS[backend][1] if importlib.util.find_spec(module) is None]
    if missing:
        return (
            f"logger.backend={backend} needs {', '.join(missing)}, which is not installed. Legal: null, or after: pip "
            'install "torchrl-trpo[loggers]"'
        )
    legal = _legal_kwargs(backend)
    for name in kwargs:
        if name not in legal:
            return f"setting 'logger.kwargs.{name}' does not exist. {nearest(name, legal)}"
    return None


def _legal_kwargs(backend: str) -> list[str]:
    """What TorchRL's logger takes that is the user's to choose; for W&B also what ``wandb.init`` does."""
    logger_class = _logger_class(backend)
    names = [name for name, p in inspect.signature(logger_class.__init__).parameters.items() if p.kind != p.VAR_KEYWORD]
    if backend == "wandb":
        names += list(inspect.signature(importlib.import_module("wandb").init).parameters)
    ours = {"self", "log_dir", *(("exp_name",) if backend in {"csv", "tensorboard"} else ()), "name", "dir", "resume"}
    return sorted({name for name in names if name not in ours})


def _logger_class(backend: str) -> Any:
    return getattr(importlib.import_module("torchrl.record.loggers"), BACKENDS[backend][0])


def _open(backend: str, kwargs: dict[str, Any], folder: Path, name: str, run_id: str | None) -> Logger:
    """TorchRL's logger, on the record with the id if there is one."""
    users_run_id = os.environ.get(_MLFLOW_RUN_ID)
    logger_class = _logger_class(backend)
    try:
        if backend in {"csv", "tensorboard"}:
            return logger_class(exp_name=backend, log_dir=str(folder), **kwargs)
        if backend == "wandb":
            given = {"exp_name": name, "project": "torchrl-trpo", "save_dir": str(folder), "id": run_id} | kwargs
            return logger_class(**given)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
        given = {"exp_name": "torchrl-trpo", "tracking_uri": uri} | kwargs
        mlflow = importlib.import_module("mlflow")
        if run_id is not None:
            os.environ[_MLFLOW_RUN_ID] = run_id
        logger = logger_class(**given)
        if run_id is None:
            mlflow.set_tag("mlflow.runName", name)
        return logger
    except Exception as error:  # each package has its own: no key, no server, another version of a database
        raise SettingError(
            f"logger.backend={backend} cannot be opened with logger.kwargs of {list(kwargs) or 'none'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        os.environ.pop(_MLFLOW_RUN_ID, None)
        if users_run_id is not None:
            os.environ[_MLFLOW_RUN_ID] = users_run_id


def _run_id(logger: Logger, backend: str) -> str | None:
    if backend == "mlflow":
        return logger.experiment.info.run_id
    return logger.experiment.id if backend == "wandb" else None


def _forget_later(logger: Logger, backend: str, frames: int) -> None:
    """Leaves out what a killed run has logged after its checkpoint, which will be logged again."""
    if backend == "tensorboard":  # by the event with which SummaryWriter tells it
        writer = logger.experiment
        writer.close()
        writer.purge_step = frames + 1
        return
    for path in Path(logger.experiment.log_dir, "scalars").glob("*.csv"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if int(line.partition(",")[0]) <= frames))


def _add_animation(writer: Any, path: Path, frames: int) -> None:
    """Shows a film in TensorBoard, as a GIF of every fourth picture; TorchRL's way needs moviepy."""
    import imageio.v2 as imageio
    from tensorboard.compat.proto.summary_pb2 import Summary

    pictures: list[Any] = [
        picture for index, picture in enumerate(imageio.mimread(path, memtest=False)) if index % 4 == 0
    ]
    encoded = io.BytesIO()
    imageio.mimwrite(encoded, pictures, format="gif", duration=200, loop=0)
    height, width, _ = pictures[0].shape
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="film", image=image)]), frames)


def _close_files(logger: Logger) -> None:
    for file in logger.experiment.files.values():
        file.close()


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str)
