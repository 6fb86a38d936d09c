"""The runs of a sweep in one table and one plot."""

from __future__ import annotations

import csv
import json
import math
import re

import imageio.v3 as imageio
import pytest
from matplotlib.figure import Figure

from tests.reporting.test_record import write_run
from torchrl_trpo import sweep


def printed(capsys, folder):
    sweep.main([str(folder)])
    return capsys.readouterr().out


def make_sweep(folder, radii="0.01,0.02"):
    """Two radii, three seeds: one run has failed, one is stopped, and of the last radius one has not begun."""
    overrides = [f"++updater.max_kl={radii}", "++seed=0,1,2", "++film=false"]  # as the recipes give them to Hydra
    (folder / "multirun.yaml").write_text(json.dumps({"hydra": {"overrides": {"task": overrides}}}))
    write_run(folder / "0", seed=0)
    write_run(folder / "1", seed=1, episode_return=10)
    write_run(folder / "2", seed=2, rows=3, state="failed", reason="EnvironmentFault: it broke")
    write_run(folder / "3", seed=0, max_kl=0.02)
    write_run(folder / "4", seed=1, max_kl=0.02, rows=5, state="stopped", reason="SystemExit: 143")


def test_a_sweep_is_summed_up_by_what_differs(tmp_path, capsys):
    make_sweep(tmp_path)
    text = printed(capsys, tmp_path)
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
    for line in (
        "2: updater.max_kl=0.01, seed 2: failed (EnvironmentFault: it broke) after 300 of 2400 frames, return 2.00",
        "4: updater.max_kl=0.02, seed 1: stopped (SystemExit: 143) after 500 of 2400 frames, return 3.00",
        "updater.max_kl=0.02: 1 of 3 runs have not begun",
    ):
        assert line in markdown
        assert line in text
    assert len(imageio.imread(tmp_path / "sweep.png")) > 400


def test_the_curves_of_a_sweep_have_the_range_of_their_seeds(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self) or path.touch())
    make_sweep(tmp_path)
    printed(capsys, tmp_path)
    (axis,) = drawn[0].axes
    curves = {line.get_label(): line.get_ydata() for line in axis.lines if not line.get_label().startswith("_")}
    first = curves["updater.max_kl=0.01 (2 of 3 runs finished)"]
    assert (first[0], first[-1]) == (4, 17)  # (1 + 10 + 1) / 3, then (24 + 10) / 2
    assert len([line for line in axis.lines if line.get_marker() == "x"]) == 2
    assert axis.collections[0].get_paths()[0].vertices[:, 1].max() == 24


def test_a_setting_of_which_no_run_has_begun_is_a_row_too(tmp_path, capsys):
    make_sweep(tmp_path, radii="0.01,0.02,0.04")
    text = printed(capsys, tmp_path)
    assert "updater.max_kl=0.04: 3 of 3 runs have not begun" in text
    assert re.search(r"^updater\.max_kl=0\.04 +0 of 3 +– ", text, re.MULTILINE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"error: folder: there is no run in .*Legal: the folder of a sweep"):
        sweep.main([str(tmp_path / "empty")])
    (tmp_path / "multirun.yaml").write_text("hydra: [")
    with pytest.raises(SystemExit, match=r"error: folder: .*multirun\.yaml cannot be read .*Legal: the file that"):
        sweep.main([str(tmp_path)])


def test_a_run_that_ends_at_minus_infinity_is_not_the_best(tmp_path, capsys):
    """It was ranked by its return from before."""
    write_run(tmp_path / "0", seed=0, episode_return=-math.inf)
    write_run(tmp_path / "1", seed=1)
    assert re.search(r"2 of 2 +-inf +-inf +22\.00", printed(capsys, tmp_path))
