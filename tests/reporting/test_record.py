"""A run's folder is read while it is written, and afterwards."""

from __future__ import annotations

import csv
import json
import os
import re

import pytest

from tests.recipes.test_recipes import RECIPES, config
from tests.training.test_resume import Killed, metrics
from torchrl_trpo.errors import SettingError
from torchrl_trpo.reporting.record import find_runs, read_rows, read_run, write_rows
from torchrl_trpo.training.metrics import COLUMNS
from torchrl_trpo.training.run import Run

HEALTHY = {"kl": 0.009, "accepted": 1.0, "step_fraction": 1.0, "cg_residual": 0.05, "explained_variance": 0.8}
HEALTHY |= {"entropy": 1.2, "factor_std": 0.2, "improvement": 0.01, "expected_improvement": 0.012}


def write_run(folder, rows=24, total=2400, state="finished", reason="", columns=COLUMNS, seed=0, max_kl=0.01, **values):
    """A folder as a run leaves it: 100 frames an iteration in 0.5 seconds, a return that grows by 1."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"algorithm": "HATRPO", "seed": seed, "env": {"name": "vmas/balance"}, "output_dir": str(folder)}
    settings |= {"updater": {"max_kl": max_kl} if max_kl else {"lr": 0.1}, "train": {"total_frames": total}}
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "state.json").write_text(json.dumps({"state": state, "reason": reason}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for i in range(1, rows + 1):
            row = {"iteration": i, "frames": 100 * i, "episode_return": i, "wall_s": i / 2, "cpu_s": i / 4}
            writer.writerow(row | HEALTHY | values)
    return folder


def test_a_run_that_is_going_on(tmp_path):
    write_run(tmp_path, rows=12, state="running")
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("13,1300,13.0,1")  # a row that is being written
    record = read_run(tmp_path)
    assert record.title == "HATRPO on vmas/balance, seed 0"
    assert (record.state, record.frames, record.total_frames) == ("running", 1200, 2400)
    assert record.episode_return == record.recent("episode_return") == 10


def test_before_the_first_iteration_and_where_there_is_no_run(tmp_path):
    record = read_run(write_run(tmp_path / "a", rows=0, state="running"))
    assert (record.frames, record.column("kl")) == (0, [])
    with pytest.raises(SettingError, match=r"folder: .* has no config\.yaml\. Legal: the folder of a run"):
        read_run(tmp_path)


def test_a_run_that_has_written_nothing_for_long_is_silent(tmp_path):
    write_run(tmp_path, rows=12, state="running")
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    record = read_run(tmp_path)
    assert record.state == "silent"
    assert re.fullmatch(r"nothing new for \d+ s", record.reason)


def test_a_run_without_a_state_is_unfinished_and_columns_may_be_missing(tmp_path):
    write_run(tmp_path, columns=COLUMNS[: COLUMNS.index("cpu_s") + 1])
    (tmp_path / "state.json").unlink()
    record = read_run(tmp_path)
    assert record.state == "unfinished"
    assert record.recent("explained_variance") == pytest.approx(0.8)
    assert len(record.column("cg_residual")) == 24


def test_how_a_run_ends_is_on_record_and_an_older_one_goes_on(tmp_path, monkeypatch):
    """With columns that its version did not have, empty in the rows that it had."""
    log = Run.log

    def log_or_fail(self, *args):
        assert json.loads((tmp_path / "state.json").read_text())["state"] == "running"
        if self._progress["iteration"] == 2:
            raise Killed("no more")
        log(self, *args)
        self._warn("something is wrong")

    settings = ["film=false", "checkpoint.every=1"]
    cfg = config("hatrpo", tmp_path, *settings)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_or_fail)
        with pytest.raises(Killed):
            RECIPES["hatrpo"].train(cfg)
    assert (read_run(tmp_path).state, read_run(tmp_path).reason) == ("failed", "Killed: no more")
    assert (tmp_path / "warnings.txt").read_text() == "1: something is wrong\n2: something is wrong\n"
    (tmp_path / "warnings.txt").write_text("1: kept\n2: kept\n3: to be said again\n")
    old = COLUMNS[: COLUMNS.index("cpu_s") + 1]
    rows = metrics(tmp_path)
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, old, restval="1", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    RECIPES["hatrpo"].train(config("hatrpo", tmp_path / "unused", *settings, f"resume={tmp_path}"))
    assert read_run(tmp_path).state == "finished"
    assert (tmp_path / "warnings.txt").read_text() == "1: kept\n2: kept\n"
    assert [row["cg_residual"] != "" for row in metrics(tmp_path)] == [False, False, True]


def test_runs_are_in_natural_order(tmp_path):
    """And what is no run is left out."""
    for number in (10, 9, 1, 2):
        write_run(tmp_path / str(number), rows=1)
    (tmp_path / "2" / "config.yaml").write_text("name: of something else")
    with pytest.warns(UserWarning, match=r"config\.yaml is not the config\.yaml of a run: it has no 'algorithm'"):
        assert [path.name for path in find_runs(tmp_path)] == ["1", "9", "10"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.csv", b"", "has no column 'iteration': its first line is ''"),
        ("metrics.csv", b"iteration;kl\n1;0\n", "has no column 'iteration': its first line is 'iteration;kl'"),
        ("metrics.csv", b"iteration,kl\n1\n2,0\n", "damaged"),
        ("metrics.csv", b"iteration,kl\n1,0,5\n2,0\n", "damaged"),
        ("metrics.csv", b"iteration,kl\nx,0\n2,0\n", "damaged"),
        ("metrics.csv", b"iteration,kl\n1,high\n", "could not convert string to float: 'high'"),
        ("metrics.csv", "iteration,kl\n1,ü\n".encode("latin-1"), "Legal: a CSV file in UTF-8"),
        ("config.yaml", b"", "it has no 'algorithm'"),
        ("config.yaml", b"a: [", "is not the config.yaml of a run"),
        ("config.yaml", b"- 1", "is not the config.yaml of a run"),
        ("config.yaml", b"\xff\xfe", "is not the config.yaml of a run"),
        ("state.json", b"{", "cannot be read"),
        ("state.json", b"[]", "it has no 'state'"),
    ],
)
def test_a_damaged_file_is_named(name, text, message, tmp_path):
    """Rows that could not be read were left out, and then lost; of other files there was a traceback."""
    (write_run(tmp_path) / name).write_bytes(text)
    with pytest.raises(SettingError, match=re.escape(message)) as caught:
        read_run(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_table_of_a_spreadsheet_is_read_and_a_table_is_replaced_whole(tmp_path):
    path = tmp_path / "metrics.csv"
    write_rows(path, ["iteration", "note"], [{"iteration": 1, "note": "ü"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_rows(path) == [{"iteration": "1", "note": "ü"}]
    with pytest.raises(ZeroDivisionError):
        write_rows(path, ["iteration"], ({"iteration": 1 / number} for number in (1, 0)))
    assert read_rows(path) == [{"iteration": "1", "note": "ü"}]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.csv"]
