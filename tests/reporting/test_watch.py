"""A run and a sweep are seen while they are written, and afterwards, as their folders say."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import imageio.v3 as imageio
import pytest
from matplotlib.figure import Figure

from tests.recipes.test_recipes import RECIPES, config
from tests.training.test_resume import Killed, metrics
from torchrl_trpo import sweep
from torchrl_trpo.reporting import watch
from torchrl_trpo.reporting.record import find_runs, read_run
from torchrl_trpo.reporting.symptoms import find_symptoms
from torchrl_trpo.training.run import COLUMNS, Run

DOCS = Path(__file__).parents[2] / "docs"
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


def printed(capsys, *arguments, of=watch):
    of.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_run_that_is_going_on(tmp_path, capsys):
    write_run(tmp_path, rows=12, state="running")
    (tmp_path / "warnings.txt").write_text("".join(f"{i}: Agent {i}: rejected.\n" for i in range(4)))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("13,1300,13.0,1")  # a row that is being written
    text = printed(capsys, tmp_path, "--once")
    assert "HATRPO on vmas/balance, seed 0, running" in text
    assert "1200 of 2400 frames, iteration 12, 200 frames/s, 0:00:06 left" in text
    assert re.search(r"^return +10\.00 +▁▂▂▃▄▄▅▅▆▇▇█ +best 12\.00", text, re.MULTILINE)
    assert re.search(r"^KL/max_kl +0\.90 .*max_kl 0\.01 nats", text, re.MULTILINE)
    for label, value in {
        "accepted": "1.00",
        "CG residual": "0.050",
        "explained variance": "0.80",
        "entropy": "1.20",
    }.items():
        assert re.search(rf"^{label} +{re.escape(value)} ", text, re.MULTILINE), label
    assert "clipped rows" not in text, "HATRPO clips nothing"
    assert re.findall(r"warning in iteration (\d)", text) == ["1", "2", "3"]


def test_before_the_first_iteration_and_before_the_first_run(tmp_path, capsys):
    assert f"No run in {tmp_path} yet" in printed(capsys, tmp_path, "--once").replace("\n", "")
    write_run(tmp_path / "a", rows=0, state="running")
    assert "No iteration is done yet" in printed(capsys, tmp_path / "a", "--once")
    assert "no iteration is done yet" in printed(capsys, tmp_path / "a", "--plot")
    assert re.search(r"^a +running +0% +–", printed(capsys, tmp_path, "--once"), re.MULTILINE)
    with pytest.raises(SystemExit, match=r"error: folder: '.*nowhere' is no folder\. Legal: that of a run or a sweep"):
        watch.main([str(tmp_path / "nowhere")])


def test_a_run_that_has_said_nothing_for_long_is_silent(tmp_path, capsys):
    write_run(tmp_path, rows=12, state="running")
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    assert re.search(r"silent \(nothing new for \d+ s\)", printed(capsys, tmp_path, "--once"))


def test_a_run_of_an_older_version_is_shown_without_what_it_has_not(tmp_path, capsys):
    write_run(tmp_path, columns=COLUMNS[: COLUMNS.index("cpu_s") + 1])
    (tmp_path / "state.json").unlink()
    text = printed(capsys, tmp_path, "--once")
    assert "unfinished" in text
    assert "explained variance" in text
    assert "CG residual" not in text
    printed(capsys, tmp_path, "--plot")
    assert len(imageio.imread(tmp_path / "diagnostics.png")) > 500


def test_the_grid_draws_what_a_run_has(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    write_run(tmp_path)
    watch.main([str(tmp_path), "--plot"])
    shown = {axis.get_title(): axis for axis in drawn[0].axes if axis.axison}
    assert len(shown) == 9
    assert all(axis.get_xlabel() == "thousand frames" and axis.get_ylabel() for axis in shown.values())
    lines = {line.get_label(): line.get_ydata() for line in shown["KL divergence"].lines}
    assert list(lines["max_kl"]) == [0.01, 0.01]
    assert list(shown["Factor M before the last agent"].lines[0].get_ydata()) == [0.2] * 24
    assert len(shown["Surrogate's improvement"].lines) == 2
    write_run(tmp_path, max_kl=None, clip_fraction=0.3, cg_residual="", step_fraction="", expected_improvement="")
    watch.main([str(tmp_path), "--plot"])
    titles = {axis.get_title() for axis in drawn[1].axes if axis.axison}
    assert "Clipped rows" in titles
    assert not titles & {"CG residual", "Step fraction"}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, None),
        ({"cg_residual": 0.2}, None),
        ({"episode_return": ""}, "No episode ends"),
        ({"accepted": 0.3}, "Steps are rejected"),
        ({"cg_residual": 0.5}, "The conjugate gradient has not converged"),
        ({"cg_residual": 0.2, "step_fraction": 0.8}, "The conjugate gradient has not converged"),
        ({"kl": 9e-6}, "The policy hardly moves"),
        ({"kl": 0.002}, "Steps end far inside the trust region"),
        ({"factor_std": 3.0}, "The agents' steps are too large for each other"),
        ({"clip_fraction": 0.7, "max_kl": None}, "Most rows are clipped"),
        ({"explained_variance": -0.4}, "The critic explains nothing"),
    ],
    ids=str,
)
def test_a_symptom_is_named_as_in_the_docs(values, name, tmp_path, capsys):
    record = read_run(write_run(tmp_path, **values))
    assert [symptom.name for symptom in find_symptoms(record)] == ([name] if name else [])
    assert find_symptoms(read_run(write_run(tmp_path, rows=19, **values))) == [], "too young"
    if name:
        assert f"## {name}\n" in (DOCS / "not-learning.md").read_text()
        write_run(tmp_path, **values)
        assert f"{name}: {next(iter(values))} " in printed(capsys, tmp_path, "--once").replace("\n", " ")


def test_how_a_run_ends_is_on_record_and_an_older_one_goes_on(tmp_path, monkeypatch, capsys):
    """With columns that its version did not have, empty in the rows that it had."""
    log = Run.log

    def log_or_fail(self, *args):
        assert json.loads((tmp_path / "state.json").read_text())["state"] == "running"
        if self._progress["iteration"] == 2:
            raise Killed("no more")
        log(self, *args)
        self._report("something is wrong")

    settings = ["film=false", "checkpoint.every=1"]
    cfg = config("hatrpo", tmp_path, *settings)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_or_fail)
        with pytest.raises(Killed):
            RECIPES["hatrpo"].train(cfg)
    assert (read_run(tmp_path).state, read_run(tmp_path).reason) == ("failed", "Killed: no more")
    assert read_run(tmp_path).reports == ["1: something is wrong", "2: something is wrong"]
    (tmp_path / "warnings.txt").write_text("1: kept\n2: kept\n3: to be said again\n")
    old = COLUMNS[: COLUMNS.index("cpu_s") + 1]
    rows = metrics(tmp_path)
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, old, restval="1", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    RECIPES["hatrpo"].train(config("hatrpo", tmp_path / "unused", *settings, f"resume={tmp_path}"))
    assert read_run(tmp_path).state == "finished"
    assert read_run(tmp_path).reports == ["1: kept", "2: kept"]
    assert [row["cg_residual"] != "" for row in metrics(tmp_path)] == [False, False, True]
    assert "finished" in printed(capsys, tmp_path, "--once")


def make_sweep(folder, radii="0.01,0.02"):
    """Two radii, three seeds: one run has failed, one is stopped, and of the last radius one has not begun."""
    overrides = [f"updater.max_kl={radii}", "seed=0,1,2", "film=false"]
    (folder / "multirun.yaml").write_text(json.dumps({"hydra": {"overrides": {"task": overrides}}}))
    write_run(folder / "0", seed=0)
    write_run(folder / "1", seed=1, episode_return=10)
    write_run(folder / "2", seed=2, rows=3, state="failed", reason="EnvironmentFault: it broke")
    write_run(folder / "3", seed=0, max_kl=0.02)
    write_run(folder / "4", seed=1, max_kl=0.02, rows=5, state="stopped", reason="SystemExit: 143")


def test_a_sweep_is_summed_up_by_what_differs(tmp_path, capsys):
    make_sweep(tmp_path)
    text = printed(capsys, tmp_path, of=sweep)
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [row["updater.max_kl"] for row in rows] == ["0.01", "0.02"]
    assert [(row["runs"], row["finished"]) for row in rows] == [("3", "2"), ("3", "1")]
    first = {name: float(value) for name, value in rows[0].items()}
    assert (first["return_mean"], first["return_min"], first["return_max"]) == (16, 10, 22)
    assert (first["cpu_s"], first["accepted"]) == (6, 1)
    assert (first["kl_over_max_kl"], float(rows[1]["kl_over_max_kl"])) == pytest.approx((0.9, 0.45))
    assert re.search(r"updater\.max_kl=0\.01 +2 of 3 +16\.00 +10\.00 +22\.00 +6 +1\.00 +0\.90", text)
    markdown = (tmp_path / "summary.md").read_text()
    assert "| updater.max_kl=0.02 | 1 of 3 | 22.00 | 22.00 | 22.00 | 6 | 1.00 | 0.45 |" in markdown
    for told in (
        "2: updater.max_kl=0.01, seed 2: failed (EnvironmentFault: it broke) after 300 of 2400 frames, return 2.00",
        "4: updater.max_kl=0.02, seed 1: stopped (SystemExit: 143) after 500 of 2400 frames, return 3.00",
        "updater.max_kl=0.02: 1 of 3 runs have not begun",
    ):
        assert told in markdown
        assert told in text
    assert len(imageio.imread(tmp_path / "sweep.png")) > 400
    text = printed(capsys, tmp_path, "--once")
    assert re.search(r"^2 +failed +12% ", text, re.MULTILINE)
    assert "2: EnvironmentFault: it broke" in text


def test_the_curves_of_a_sweep_have_the_range_of_their_seeds(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    make_sweep(tmp_path)
    printed(capsys, tmp_path, of=sweep)
    (axis,) = drawn[0].axes
    curves = {line.get_label(): line.get_ydata() for line in axis.lines if not line.get_label().startswith("_")}
    first = curves["updater.max_kl=0.01 (2 of 3 runs finished)"]
    assert (first[0], first[-1]) == (4, 17)  # (1 + 10 + 1) / 3, then (24 + 10) / 2
    assert len([line for line in axis.lines if line.get_marker() == "x"]) == 2
    assert axis.collections[0].get_paths()[0].vertices[:, 1].max() == 24


def test_a_setting_of_which_no_run_has_begun_is_a_row_too(tmp_path, capsys):
    make_sweep(tmp_path, radii="0.01,0.02,0.04")
    text = printed(capsys, tmp_path, of=sweep)
    assert "updater.max_kl=0.04: 3 of 3 runs have not begun" in text
    assert re.search(r"^updater\.max_kl=0\.04 +0 of 3 +– ", text, re.MULTILINE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"error: folder: there is no run in .*Legal: the folder of a sweep"):
        sweep.main([str(tmp_path / "empty")])


def test_runs_are_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        write_run(tmp_path / str(number), rows=1)
    assert [path.name for path in find_runs(tmp_path)] == ["1", "9", "10"]
