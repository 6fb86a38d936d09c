"""TorchRL's loggers, for the metrics of a run: CSV, TensorBoard, Weights & Biases, MLflow.

A resumed run goes on in the same record. TorchRL's ``get_logger(state_dict=)`` does not serve for this: in 0.14.1 it
refuses MLflow, goes on in another folder with TensorBoard, keeps absolute folders, so that a run could not be moved,
takes no settings for CSV, and does not remove what was logged after the checkpoint.
"""

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
from torchrl_trpo.reporting.record import flat, read_json, replace_file
from torchrl_trpo.seeding import untouched_generators

if TYPE_CHECKING:
    from torchrl.record.loggers import Logger

BACKENDS: Mapping[str, tuple[str, Sequence[str]]] = {
    "csv": ("CSVLogger", ()),
    "tensorboard": ("TensorboardLogger", ("tensorboard",)),
    "wandb": ("WandbLogger", ("wandb",)),
    "mlflow": ("MLFlowLogger", ("mlflow", "sqlalchemy", "alembic")),
}
"""For each backend the class in ``torchrl.record.loggers``, and the modules that it needs."""
_RECORD_FILE = "logger.json"
"""The file in the run's folder with the backend and, for W&B and MLflow, the id of the run there."""
_MLFLOW_RUN_ID = "MLFLOW_RUN_ID"
"""The environment variable that makes ``mlflow.start_run`` continue a run; ``MLFlowLogger`` has no argument for it."""


class RunLogger:
    """Sends the metrics of a run to one of TorchRL's loggers, or with None as the backend nowhere.

    The backend's package is imported by the constructor, and no global random number is drawn.

    Args:
        backend: ``"csv"``, ``"tensorboard"``, ``"wandb"``, ``"mlflow"`` or None.
        kwargs: further arguments of TorchRL's logger.
        folder: the run's folder; CSV and TensorBoard write into it.
        name: the run's name, for W&B and MLflow.
        frames: the frames done so far. If there are any, the record that ``logger.json`` names is continued.

    Attributes:
        continues: whether a record is continued.
    """

    def __init__(
        self, backend: str | None, kwargs: Mapping[str, Any], *, folder: Path, name: str, frames: int = 0
    ) -> None:
        self._backend = backend
        self._logger: Logger | None = None
        self.continues = False
        if backend is None:
            return
        record_file = folder / _RECORD_FILE
        before = read_json(record_file) if frames and record_file.exists() else {}
        before = before if before.get("backend") == backend else {}
        self.continues = bool(before)
        with untouched_generators():
            self._logger = _open(backend, dict(kwargs), folder, name, before.get("id"))
            if before and backend in {"csv", "tensorboard"}:
                _remove_after(self._logger, backend, frames)
            replace_file(record_file, json.dumps({"backend": backend, "id": _run_id(self._logger, backend)}) + "\n")

    def log_settings(self, record: Mapping[str, Any]) -> None:
        """Logs the settings, unless a record is continued that has them.

        Args:
            record: the settings, as in ``config.yaml``.
        """
        if self._logger is None or self.continues:
            return
        settings = flat(record).items()
        plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings}
        with untouched_generators():
            self._logger.log_hparams(plain)

    def log(self, metrics: Mapping[str, float], frames: int) -> None:
        """Logs numbers; a NaN is left out.

        Args:
            metrics: the numbers by name.
            frames: the step.
        """
        if self._logger is None:
            return
        with untouched_generators():
            self._logger.log_metrics({name: v for name, v in metrics.items() if not math.isnan(v)}, step=frames)

    def log_film(self, path: Path, frames: int) -> None:
        """Logs a film to the backends that can show it; the CSV logger cannot.

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
        """Ends the record; a resumed run opens it again.

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
                for file in self._logger.experiment.files.values():
                    file.close()
        self._logger = None


def logger_problem(backend: str | None, kwargs: Mapping[str, Any]) -> str | None:
    """Checks the settings of a logger.

    Args:
        backend: the backend's name.
        kwargs: further arguments of its logger.

    Returns:
        What is wrong, or None.
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
    """The arguments of TorchRL's logger that a user may set; for W&B also those of ``wandb.init``."""
    logger_class = _logger_class(backend)
    names = [name for name, p in inspect.signature(logger_class.__init__).parameters.items() if p.kind != p.VAR_KEYWORD]
    if backend == "wandb":
        names += list(inspect.signature(importlib.import_module("wandb").init).parameters)
    ours = {"self", "log_dir", *(("exp_name",) if backend in {"csv", "tensorboard"} else ()), "name", "dir", "resume"}
    return sorted({name for name in names if name not in ours})


def _logger_class(backend: str) -> Any:
    return getattr(importlib.import_module("torchrl.record.loggers"), BACKENDS[backend][0])


def _open(backend: str, kwargs: dict[str, Any], folder: Path, name: str, run_id: str | None) -> Logger:
    """Opens TorchRL's logger, on an existing record if an id is given."""
    try:
        if backend == "mlflow":
            return _open_mlflow(kwargs, name, run_id)
        if backend == "wandb":
            ours = {"exp_name": name, "project": "torchrl-trpo", "save_dir": str(folder), "id": run_id}
        else:
            ours = {"exp_name": backend, "log_dir": str(folder)}
        return _logger_class(backend)(**ours | kwargs)
    except Exception as error:  # each package has its own: no key, no server, another version of a database
        raise SettingError(
            f"logger.backend={backend} cannot be opened with logger.kwargs of {list(kwargs) or 'none'}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _open_mlflow(kwargs: dict[str, Any], name: str, run_id: str | None) -> Logger:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
    users_run_id = os.environ.get(_MLFLOW_RUN_ID)
    if run_id is not None:
        os.environ[_MLFLOW_RUN_ID] = run_id
    try:
        logger = _logger_class("mlflow")(**{"exp_name": "torchrl-trpo", "tracking_uri": uri} | kwargs)
    finally:
        os.environ.pop(_MLFLOW_RUN_ID, None)
        if users_run_id is not None:
            os.environ[_MLFLOW_RUN_ID] = users_run_id
    if run_id is None:
        importlib.import_module("mlflow").set_tag("mlflow.runName", name)
    return logger


def _run_id(logger: Logger, backend: str) -> str | None:
    if backend == "mlflow":
        return logger.experiment.info.run_id
    return logger.experiment.id if backend == "wandb" else None


def _remove_after(logger: Logger, backend: str, frames: int) -> None:
    """Removes what a killed run has logged after its checkpoint; it will be logged again."""
    if backend == "tensorboard":  # SummaryWriter writes an event that makes TensorBoard skip these steps
        writer = logger.experiment
        writer.close()
        writer.purge_step = frames + 1
        return
    for path in Path(logger.experiment.log_dir, "scalars").glob("*.csv"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        replace_file(path, "".join(line for line in lines if int(line.partition(",")[0]) <= frames))


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
