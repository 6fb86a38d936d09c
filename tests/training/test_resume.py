"""A run that is stopped anywhere and resumed is the run that was never stopped, to the bit."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torchrl.checkpoint import GlobalRNGState

from tests.environments import Copy
from tests.recipes.test_recipes import RECIPES, TINY, config
from torchrl_trpo.errors import SettingError
from torchrl_trpo.training.checkpoints import find_checkpoint
from torchrl_trpo.training.continuation import check_unfinished, rows_before
from torchrl_trpo.training.metrics import Metrics
from torchrl_trpo.training.run import Run
from torchrl_trpo.training.run_folder import RunFolder

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
EPISODE = ("episode_return", "episode_return_sum", "episode_length")
TIMES = {"collect_s", "policy_s", "critic_s", "wall_s", "cpu_s"}


class Killed(BaseException):
    """As if the process had ended there."""


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def components(folder):
    """All that the last checkpoint holds, by file."""
    checkpoint = find_checkpoint(folder)
    files = sorted(checkpoint.rglob("state.pt"))
    found = {str(file.parent.relative_to(checkpoint)): torch.load(file, weights_only=True) for file in files}
    for state in found.values():
        if "states" in state:  # of other processes, as they sent them
            state["states"] = [torch.load(io.BytesIO(bytes(part)), weights_only=True) for part in state["states"]]
    return found


def differences(one, other, place=""):
    """Where two nested containers are not the same to the bit."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{place}: {one.keys() ^ other.keys()}"]
        return [d for key in one for d in differences(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)} entries"]
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{place}.{i}")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        return [] if same and torch.equal(one.isnan(), other.isnan()) else [place]
    return [] if one == other else [f"{place}: {one} and {other}"]


def train_until(iteration, name, cfg):
    """Trains, and ends when an iteration has done everything but being logged."""
    log = Run.log

    def log_or_stop(self, *args):
        if self._progress["iteration"] == iteration - 1:
            raise Killed
        log(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log_or_stop)
        with pytest.raises(Killed):
            RECIPES[name].train(cfg)


def check_same(whole, resumed):
    assert metrics(whole) == metrics(resumed)
    assert differences(components(whole), components(resumed)) == []
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, resumed))
    assert one["evaluation_return"] == other["evaluation_return"]
    assert one["best_return"] == other["best_return"]


FAR = "env.factory=tests.environments.make_far"
CASES = [  # the first one has episodes that do not end together, and old observations beside those that begin
    ("trpo", "gym/CartPole-v1", ["normalize_observations=true", "critic.value_norm=true", "env.max_steps=50"]),
    ("trpo", "gym/Pendulum-v1", ["actor.network=lstm", "critic.network=gru"]),
    pytest.param("itrpo", "vmas/balance", ["critic.value_norm=true"], marks=pytest.mark.slow),
    ("itrpo", "pettingzoo/simple_spread_v3", ["env.parallel=true", "env.num_envs=2"]),
    pytest.param(
        "matrpo",
        "vmas/navigation",
        ["normalize_observations=true", "updater.fisher_subsample=0.5"],
        marks=pytest.mark.slow,
    ),
    pytest.param("matrpo", "pettingzoo/simple_tag_v3", ["critic.inputs=both"], marks=pytest.mark.slow),
    ("hatrpo", "vmas/balance", ["critic.value_norm=true", "normalize_observations=true"]),
    pytest.param("hatrpo", "vmas/simple_spread", ["actor.network=gru"], marks=pytest.mark.slow),
    pytest.param(
        "hatrpo", "pettingzoo/simple_speaker_listener_v4", ["env.continuous_actions=true"], marks=pytest.mark.slow
    ),
    pytest.param("hatrpo", "vmas/simple_spread", ["env.compiled=true"], marks=NEEDS_COMPILER),
    ("happo", "vmas/balance", ["normalize_observations=true", "updater.minibatch_size=20"]),
    pytest.param("mappo", "vmas/navigation", ["updater.minibatch_size=20"], marks=pytest.mark.slow),
    ("hatrpo", "mamujoco/Swimmer", ["env.kwargs.agent_conf=2x1"]),
    # A factory's transforms stood for its simulator, which began anew in mid-episode.
    ("trpo", "custom", [FAR, "env.kwargs.learns=true", "env.max_steps=50"]),
    pytest.param("trpo", "custom", [FAR, "env.parallel=true", "env.max_steps=50"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "env", "overrides"), CASES)
@pytest.mark.usefixtures("quick_processes")
def test_resumed_is_uninterrupted(name, env, overrides, tmp_path):
    common = [f"env={env}", "film=false", "checkpoint.every=2", "env.max_steps=9"]
    common += ["train.frames_per_batch=40", "train.total_frames=160", *overrides]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    RECIPES[name].train(config(name, whole, *common))
    train_until(4, name, config(name, parts, *common))
    torch.manual_seed(1234)  # what happens in between does not matter
    RECIPES[name].train(config(name, tmp_path / "unused", *common, f"resume={parts}"))
    check_same(whole, parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of the iterations 4 and 5, and of the best."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    RECIPES["hatrpo"].train(config("hatrpo", folder, "film=false", "train.total_frames=400", "checkpoint.every=1"))
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(folder, *overrides, name="hatrpo"):
    cfg = config(name, folder.parent / "unused", f"resume={folder}", "train.total_frames=480", *overrides)
    return RECIPES[name].train(cfg)


def test_a_run_killed_after_its_last_checkpoint_only_has_to_finish(run_folder):
    """Evaluation, plot and summary are made then; a run that has them is finished, and says what continues it."""
    before = json.loads((run_folder / "summary.json").read_text())
    (run_folder / "summary.json").unlink()
    cfg = config("hatrpo", run_folder, f"resume={run_folder}", "train.total_frames=400")
    summary = RECIPES["hatrpo"].train(cfg)
    assert summary["evaluation_return"] == before["evaluation_return"]
    assert len(metrics(run_folder)) == 5
    with pytest.raises(SettingError, match=r"has done 400 frames already.*train\.total_frames=480"):
        RECIPES["hatrpo"].train(cfg)


def change_manifest(folder, **changes):
    path = find_checkpoint(folder) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_format(folder, version):
    record = json.loads((find_checkpoint(folder) / "manifest.json").read_text())["metadata"]
    change_manifest(folder, metadata={**record, "format_version": version})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: change_manifest(f, format_version=99),
            r"newer checkpoint format version 99.*Move it elsewhere to use",
        ),
        (lambda f: change_format(f, 2), r"has format 2, of torchrl-trpo .*reads format 1\. Use"),
        (
            lambda f: (find_checkpoint(f) / "manifest.json").write_text("{"),
            r"cannot be read .*Move it elsewhere to use",
        ),
        (lambda f: (find_checkpoint(f) / "manifest.json").unlink(), r"cannot be read .*Move it elsewhere to use"),
        (lambda f: os.truncate(state_file(f, "losses"), 1000), r"cannot be read .*'losses'.*Move it elsewhere to use"),
        (lambda f: state_file(f, "policy").unlink(), r"cannot be read .*'policy'.*Move it elsewhere to use"),
        (lambda f: torch.save(Malicious(f), state_file(f, "policy")), r"cannot be read .*'policy'.*[Ww]eights.only"),
        (
            lambda f: change_a_byte(state_file(f, "policy")),
            r"cannot be read .*has changed since it was written.*Move it",
        ),
        (lambda f: drop_row(f, 3), r"metrics\.csv should have one row .*missing are \[3\]"),
        (lambda f: shutil.rmtree(f / "checkpoints"), r"has no checkpoint\. Legal: "),
    ],
    ids=[
        "newer",
        "our_newer",
        "half_manifest",
        "no_manifest",
        "half_file",
        "no_file",
        "malicious",
        "byte",
        "row",
        "none",
    ],
)
def test_a_checkpoint_that_cannot_be_continued_says_what_to_do(damage, message, run_folder):
    damage(run_folder)
    before = sorted(run_folder.rglob("*"))
    with pytest.raises(SettingError, match=message):
        resume(run_folder)
    assert [path for path in before if not path.exists()] == [], "nothing is removed"
    assert not (run_folder / "ran").exists(), "nothing in the file was run"


def test_the_one_before_can_be_continued(run_folder):
    os.truncate(state_file(run_folder, "losses"), 1000)
    shutil.rmtree(find_checkpoint(run_folder))
    resume(run_folder)
    assert [row["iteration"] for row in metrics(run_folder)] == list("123456")


def state_file(folder, name):
    return next(find_checkpoint(folder).glob(f"components/*-{name}/state.pt"))


def change_a_byte(path):
    """In the middle, where the numbers are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def drop_row(folder, iteration):
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(f"{iteration},")))


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "ran",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", r"has seed=0, and now it is 1\. Leave seed out"),
        ("env.kwargs.n_agents=3", r"has env\.kwargs=.*now it is"),
        ("env.num_envs=16", r"has env\.num_envs=4, and now it is 16"),
        ("critic.hidden=[7]", r"has critic\.hidden=\[128, 128\], and now it is \[7\]"),
        ("normalize_observations=true", r"has normalize_observations=False"),
    ],
)
def test_a_change_that_matters_is_refused(change, message, run_folder):
    with pytest.raises(SettingError, match=message):
        resume(run_folder, change)


def test_a_change_that_does_not_is_told_and_counts(run_folder, caplog, monkeypatch):
    seen = {}

    def see(self, data, stats, fit):
        seen.update(lr=self._critic_optim.param_groups[0]["lr"], max_kl=self._updaters[0].max_kl)
        seen.update({n.rpartition(".")[2]: float(v) for n, v in self._losses.named_buffers() if v.numel() == 1})
        log(self, data, stats, fit)

    log = Run.log
    monkeypatch.setattr(Run, "log", see)
    resume(run_folder, "critic.lr=0.5", "updater.max_kl=0.5", "gamma=0.5", "entropy_coeff=0.25", "film=false")
    for told in ("critic.lr was 0.001 until now, and is 0.5", "updater.max_kl was 0.01", "gamma was 0.95"):
        assert told in caplog.text
    assert "film" not in caplog.text
    assert {name: seen[name] for name in ("lr", "max_kl", "gamma", "entropy_coeff")} == {
        "lr": 0.5, "max_kl": 0.5, "gamma": 0.5, "entropy_coeff": 0.25
    }  # fmt: skip


def test_a_run_is_not_written_over_or_written_twice(run_folder):
    with pytest.raises(SettingError, match=r"output_dir: .*holds a run already.*resume="):
        RECIPES["hatrpo"].train(config("hatrpo", run_folder))
    lock = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", lock, str(run_folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        with pytest.raises(SettingError, match="is going on in another process"):
            resume(run_folder)
        other.communicate(b"\n")
    resume(run_folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", "{}", r"holds a run without its checkpoints, which would be lost"),
        ("metrics.csv", "iteration\n1\n", r"holds a run without its checkpoints, which would be lost"),
        ("config.yaml", "model: mine", r"config\.yaml is not the config\.yaml of a run.* Or another folder\."),
        ("config.yaml", "a: [", r"config\.yaml is not the config\.yaml of a run"),
        (".", None, r"cannot be used \(.*Legal: a folder that can be read and written"),
    ],
)
def test_nothing_in_a_folder_is_lost(name, text, message, tmp_path):
    folder = tmp_path / "run"
    if text is None:
        folder.touch()
    else:
        folder.mkdir()
        (folder / name).write_text(text)
    with pytest.raises(SettingError, match=rf"^output_dir: .*{message}"):
        RunFolder(folder).take({"resume": None})


@pytest.mark.parametrize(
    ("total", "batch", "message"),
    [
        (160, 80, r"has done 240 frames already, and train\.total_frames=160\. .*train\.total_frames=320"),
        (400, 100, r"the 160 left to train\.total_frames=400 are not a multiple of train\.frames_per_batch=100\..*80"),
        (400, 80, None),
        (240, 80, None),
    ],
)
def test_whole_batches_are_left(total, batch, message, tmp_path):
    settings = {"train": {"total_frames": total, "frames_per_batch": batch}}
    with contextlib.nullcontext() if message is None else pytest.raises(SettingError, match=message):
        check_unfinished(tmp_path, 240, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iteration,kl\n", r"should have one row for each iteration up to 3.*missing are \[1, 2, 3\]"),
        ("iteration,note\n1,\n2,\n3,\n", r"has a column 'note', which would be lost"),
        ("iteration,kl\n2,0\n3,0\n", None),
    ],
)
def test_rows_are_not_lost(text, message, tmp_path, caplog):
    (tmp_path / "metrics.csv").write_text(text)
    if message is None:
        assert len(rows_before(tmp_path / "metrics.csv", 3)) == 2
        assert "begins with iteration 2" in caplog.text
    else:
        with pytest.raises(SettingError, match=message):
            rows_before(tmp_path / "metrics.csv", 3)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    folder, save = tmp_path / "run", torch.save

    def save_until_full(state, path):
        save(state, path)
        if "000000000003" in str(path) and "losses" in str(path):
            os.truncate(path, 100)
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_full)
        with pytest.raises(OSError, match="No space left"):
            RECIPES["hatrpo"].train(config("hatrpo", folder, "film=false", "checkpoint.every=1"))
    assert find_checkpoint(folder).name.endswith("2")
    assert [path.name for path in (folder / "checkpoints").glob(".*")] == []
    resume(folder)
    assert len(metrics(folder)) == 6


class Buffered(Copy):
    """Has a buffer, and says nothing of its state."""

    def __init__(self, num_envs):
        super().__init__({"agents": (2, 4, ("continuous", 4))}, num_envs)
        self.register_buffer("scale", torch.ones(1))


class Stateful(Buffered):
    """Gives an array of NumPy as its state."""

    def get_extra_state(self):
        return {"scale": self.scale.numpy()}


def make_buffered(num_envs, plain):
    return (Buffered if plain else Stateful)(num_envs)


def custom(plain):
    name = "tests.training.test_resume.make_buffered"
    return ["env=custom", f"env.factory={name}", f"env.kwargs.plain={plain}", "film=false", "team_reward=mean"]


def test_buffers_are_not_the_environments_state(tmp_path, caplog, monkeypatch):
    """A buffer was once taken for it: an old observation was continued in a new episode, and nothing said so.

    Later each resumed run began with the episodes of the first iteration again.
    """
    log, batches = Run.log, []
    monkeypatch.setattr(Run, "log", lambda self, data, *rest: batches.append(data.clone()) or log(self, data, *rest))
    RECIPES["hatrpo"].train(config("hatrpo", tmp_path, *custom("true")))
    assert components(tmp_path)[collection_of(tmp_path)]["simulator"] == {}
    assert "begins new episodes" in caplog.text, "it is told while there is time to change it"
    resume(tmp_path, "film=false")
    assert len(metrics(tmp_path)) == 6
    first, _, _, resumed, *_ = (batch["agents", "observation"] for batch in batches)
    assert not (first == resumed).any()


def test_a_state_that_cannot_be_read_again_is_refused_at_once(tmp_path):
    """Checkpoints with it were written to the end of the run, and none could be loaded."""
    with pytest.raises(SettingError, match=r"get_extra_state.*Legal: tensors, numbers, text, and lists"):
        RECIPES["hatrpo"].train(config("hatrpo", tmp_path, *custom("false")))
    assert metrics(tmp_path) == []


def collection_of(folder):
    return next(name for name in components(folder) if name.endswith("collection"))


def test_a_film_that_failed_is_made_by_resume(run_folder, monkeypatch):
    """The summary, by which a run is known as finished, was written before."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "torchrl_trpo.training.summary.film_run",
            lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")),
        )
        with pytest.raises(OSError, match="No space left"):
            resume(run_folder, "film=true")
    resume(run_folder, "film=true")
    assert (run_folder / "film.mp4").exists()
    assert json.loads((run_folder / "summary.json").read_text())["frames"] == 480


def test_a_run_killed_in_its_first_checkpoint_begins_anew(tmp_path):
    """It could neither be continued nor begun."""
    rest = tmp_path / "checkpoints" / ".checkpoint-000000000000.stage-0123"
    rest.mkdir(parents=True)
    RECIPES["hatrpo"].train(config("hatrpo", tmp_path, "film=false"))
    assert not rest.exists()


def test_random_numbers_of_gpus_that_are_gone_are_left_out(run_folder, caplog):
    """The advice was to remove the checkpoint."""
    path = state_file(run_folder, "generators")
    state = torch.load(path, weights_only=True)
    torch.save({**state, "torch_cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)}, path)
    resume(run_folder)
    assert "their random numbers are not continued" in caplog.text


@pytest.mark.parametrize(("value", "best"), [(float("inf"), None), (0.0, 0.0)])
def test_any_best_return_can_be_recorded(value, best, tmp_path, monkeypatch):
    """An infinite one ended the run, and 0 was written as none."""
    monkeypatch.setattr("torchrl_trpo.training.metrics.episode_statistics", lambda *_: dict.fromkeys(EPISODE, value))
    summary = RECIPES["hatrpo"].train(config("hatrpo", tmp_path, "film=false", "non_finite=drop"))
    assert json.loads((tmp_path / "summary.json").read_text())["best_return"] == best == summary["best_return"]


def test_metrics_that_cannot_be_closed_still_say_how_to_continue(tmp_path, monkeypatch, capsys):
    """And the environment is closed: on a full disk both were left out."""
    closed = []

    def close(self, original=Metrics.close):
        original(self)
        os.write(-1, b"")  # as closing a file on a full disk

    def fill(self, *args):
        monkeypatch.setattr(Metrics, "close", close)
        monkeypatch.setattr(self.env, "close", lambda **_: closed.append(True))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "log", fill)
    with pytest.raises(OSError, match="Bad file descriptor"):
        RECIPES["hatrpo"].train(config("hatrpo", tmp_path, "film=false"))
    assert closed
    assert f"resume={tmp_path}" in capsys.readouterr().out


def test_what_a_killed_writer_left_is_removed(run_folder):
    rest = run_folder / "checkpoints" / ".checkpoint-000000000006.stage-0123"
    rest.mkdir()
    (rest / "state.pt").write_bytes(b"half")
    resume(run_folder)
    assert not rest.exists()


@pytest.mark.parametrize(
    ("number", "env"),
    [
        (signal.SIGINT, ["env=vmas/balance", "env.num_envs=4"]),
        pytest.param(signal.SIGTERM, ["env=vmas/balance", "env.num_envs=4"], marks=pytest.mark.slow),
        pytest.param(
            signal.SIGINT,
            ["env=pettingzoo/simple_speaker_listener_v4", "env.num_envs=1", "env.parallel=true"],
            marks=pytest.mark.slow,  # its processes import everything
        ),
    ],
)
@pytest.mark.usefixtures("quick_processes")
def test_a_signal_ends_the_iteration_and_writes_a_checkpoint(number, env, tmp_path):
    """And another process goes on from it. Ctrl-C goes to all processes."""
    folder = tmp_path / "run"
    settings = [*env, "film=false", "train.total_frames=400", "train.frames_per_batch=100", "checkpoint.every=1000"]
    settings += ["critic.minibatch_size=100"]
    command = [sys.executable, "-m", "torchrl_trpo.recipes.hatrpo", *TINY, *settings, f"output_dir={folder}"]
    settings_of_process = {"start_new_session": True, "preexec_fn": heed_sigint}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **settings_of_process) as run:
        wait_for(lambda: (folder / "metrics.csv").exists() and len(metrics(folder)) >= 2)
        os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
        said, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    done = len(metrics(folder))
    assert f"Stopped after {100 * done} frames. The checkpoint of iteration {done} is whole" in said
    assert f"resume={folder}" in said
    RECIPES["hatrpo"].train(config("hatrpo", tmp_path / "unused", *settings, f"resume={folder}"))
    assert [int(row["iteration"]) for row in metrics(folder)] == [1, 2, 3, 4]


def heed_sigint():
    """A process in the background of a shell inherits that SIGINT is ignored, and then a run ignores it too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_trainings_in_one_process_do_not_affect_each_other(tmp_path):
    def train(folder, name="hatrpo", *overrides):
        RECIPES[name].train(config(name, tmp_path / folder, "film=false", *overrides))
        return metrics(tmp_path / folder)

    before = GlobalRNGState().state_dict()
    alone = train("alone")
    assert differences(GlobalRNGState().state_dict(), before) == [], "the process's random numbers are as they were"
    torch.rand(3)
    train("other", "matrpo", "seed=5", "env=vmas/navigation", "env.continuous_actions=false")
    assert train("again") == alone


def test_two_trainings_at_once_in_one_process_are_refused(tmp_path, monkeypatch):
    def second(self, *args):
        RECIPES["itrpo"].train(config("itrpo", tmp_path / "second"))

    monkeypatch.setattr(Run, "log", second)
    with pytest.raises(RuntimeError, match=r"another training is running in this process.*a process for each"):
        RECIPES["hatrpo"].train(config("hatrpo", tmp_path / "first"))
