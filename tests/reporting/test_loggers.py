"""TorchRL's loggers get the metrics, the settings and the film of a run, and go on where it goes on."""

from __future__ import annotations

import csv
import json
import math

import imageio.v2 as imageio
import numpy as np
import pytest
from omegaconf import OmegaConf
from torchrl.checkpoint import GlobalRNGState

from tests.recipes.test_recipes import RECIPES, config
from tests.training.test_resume import differences, metrics, train_until
from torchrl_trpo.errors import SettingError
from torchrl_trpo.reporting import loggers
from torchrl_trpo.reporting.loggers import RunLogger

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio's pipes

SETTINGS = {"seed": 3, "updater": {"max_kl": 0.02}, "actor": {"hidden": [8, 8]}, "resume": None}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    imageio.mimwrite(path, np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8), fps=20)
    return path


def record_twice(backend, folder, film, **kwargs):
    """A run that is killed after 300 frames with its checkpoint at 200, and resumed there."""
    before = GlobalRNGState().state_dict()
    logger = RunLogger(backend, kwargs, folder=folder, name="HATRPO")
    assert not logger.continues
    logger.log_settings(SETTINGS)
    for frames in (100, 200, 300):
        logger.log({"kl": frames / 1e4, "episode_return": math.nan}, frames)
    logger.close(failed=True)
    logger = RunLogger(backend, kwargs, folder=folder, name="HATRPO, a second time", frames=200)
    assert logger.continues
    logger.log_settings(SETTINGS)
    logger.log({"kl": 3.0, "episode_return": 7.0}, 300)
    logger.log_film(film, 300)
    logger.close()
    assert differences(GlobalRNGState().state_dict(), before) == [], "no random number of the run was drawn"


def test_csv(tmp_path, film):
    record_twice("csv", tmp_path, film)
    rows = list(csv.reader((tmp_path / "csv" / "scalars" / "kl.csv").read_text().splitlines()))
    assert rows == [["100", "0.01"], ["200", "0.02"], ["300", "3.0"]]
    assert (tmp_path / "csv" / "scalars" / "episode_return.csv").read_text() == "300,7.0\n", "a NaN is no number"
    assert "updater.max_kl: 0.02" in (tmp_path / "csv" / "texts" / "hparams0.txt").read_text()


def test_tensorboard(tmp_path, film):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record_twice("tensorboard", tmp_path, film)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("kl")] == [100, 200, 300], (
        "what was logged after the checkpoint is out"
    )
    assert [event.value for event in events.Scalars("kl")] == pytest.approx([0.01, 0.02, 3.0])
    (image,) = events.Images("film")
    assert (image.step, image.width, image.height) == (300, 48, 32)
    assert len(imageio.mimread(image.encoded_image_string)) == 3
    (hparams,) = (path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir())
    content = EventAccumulator(str(hparams)).Reload().PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"updater.max_kl" in content


def test_wandb_offline(tmp_path, film, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_SILENT"):
        monkeypatch.setenv(name, "offline" if name == "WANDB_MODE" else "true")
    seen = []
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, data, **kwargs: (seen.append(data), log(self, data, **kwargs))[1]
    )
    record_twice("wandb", tmp_path, film, project="test", mode="offline", log_env_packages=False)
    assert [(row["step"], row["kl"]) for row in seen if "kl" in row] == [
        (100, 0.01),
        (200, 0.02),
        (300, 0.03),
        (300, 3.0),
    ]
    assert seen[-1]["film"]._path.endswith(".mp4")
    records = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    ids = {path.stem.removeprefix("run-") for path in records}
    assert ids == {json.loads((tmp_path / "logger.json").read_text())["id"]}, "both parts are of one run"
    assert b"updater.max_kl" in b"".join(path.read_bytes() for path in records)


@pytest.mark.slow
def test_mlflow(tmp_path, film):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    record_twice("mlflow", tmp_path, film, tracking_uri=uri, artifact_location=str(tmp_path / "artifacts"))
    client = mlflow.MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'torchrl-trpo'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "logger.json").read_text())["id"]
    assert run.info.run_name == "HATRPO"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "updater.max_kl": "0.02", "actor.hidden": "[8, 8]", "resume": "None"}
    history = client.get_metric_history(run.info.run_id, "kl")
    assert [(point.step, point.value) for point in history] == [(100, 0.01), (200, 0.02), (300, 0.03), (300, 3.0)]
    assert list((tmp_path / "artifacts").rglob("film.mp4"))


def test_a_run_logs_its_columns_and_goes_on_in_one_record(tmp_path):
    """Killed in its third iteration with a checkpoint of the first; logged or not, the run is the same to the bit."""
    settings = ["film=false"]
    logged, plain = tmp_path / "logged", tmp_path / "plain"
    train_until(3, "hatrpo", config("hatrpo", logged, *settings, "checkpoint.every=1", "logger.backend=csv"))
    RECIPES["hatrpo"].train(config("hatrpo", tmp_path / "unused", *settings, f"resume={logged}"))
    RECIPES["hatrpo"].train(config("hatrpo", plain, *settings))
    assert metrics(logged) == metrics(plain)
    rows = metrics(logged)
    scalars = {path.stem: path.read_text().split() for path in (logged / "csv" / "scalars").iterdir()}
    assert scalars.pop("evaluation_return")[0].startswith("240,")
    assert scalars.keys() > rows[0].keys() - {"frames", "clip_fraction"}
    for name in ("kl", "cg_residual", "episode_return", "iteration"):
        said = [line.split(",") for line in scalars[name]]
        assert [int(frames) for frames, _ in said] == [80, 160, 240]
        assert [float(value) for _, value in said] == [float(row[name]) for row in rows]
    assert OmegaConf.load(logged / "config.yaml").logger.backend == "csv", "the settings of the run count"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["logger.backend=tensorbord"],
            r"logger\.backend: 'tensorbord'\. Did you mean 'tensorboard'\? Legal: .*'null'",
        ),
        (["logger.backend=csv", "logger.kwargs=3"], r"logger\.kwargs must be a mapping of arguments .*, got 3"),
        (["logger.kwargs.project=a"], r"logger\.kwargs with logger\.backend=null: nobody reads them\. Legal: \{\}\."),
        (
            ["logger.backend=csv", "logger.kwargs.video_fsp=9"],
            r"setting 'logger\.kwargs\.video_fsp' does not exist\. Did you mean 'video_fps' or 'video_format'\?",
        ),
        (["logger.backend=csv", "logger.kwargs={log_dir: x}"], r"setting 'logger\.kwargs\.log_dir' does not exist"),
        (["logger.bakend=csv"], r"setting 'logger\.bakend' does not exist\. Did you mean 'logger\.backend'"),
    ],
)
def test_bad_settings_are_told_before_training(overrides, message, tmp_path):
    with pytest.raises(SettingError, match=message):
        RECIPES["hatrpo"].train(config("hatrpo", tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_told_before_training(tmp_path, monkeypatch):
    find = loggers.importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(SettingError, match=r"needs wandb, which is not installed.*torchrl-trpo\[loggers\]"):
        RECIPES["hatrpo"].train(config("hatrpo", tmp_path / "run", "logger.backend=wandb"))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_opened_is_told_before_training(tmp_path):
    pytest.importorskip("mlflow")
    overrides = ["logger.backend=mlflow", "logger.kwargs.tracking_uri=nosuch://place"]
    with pytest.raises(SettingError, match=r"logger\.backend=mlflow cannot be opened .*tracking_uri.*nosuch"):
        RECIPES["hatrpo"].train(config("hatrpo", tmp_path / "run", *overrides))
