"""The pictures of a run, while it is going on and afterwards."""

from __future__ import annotations

import imageio.v3 as imageio
import pytest
from matplotlib.figure import Figure
from torchrl.checkpoint import GlobalRNGState

from tests.recipes.test_recipes import RECIPES, config
from tests.reporting.test_record import write_run
from tests.training.test_resume import differences, train_until
from torchrl_trpo.reporting import plots
from torchrl_trpo.reporting.plots import Pictures, plot_diagnostics
from torchrl_trpo.reporting.record import read_run
from torchrl_trpo.training.metrics import COLUMNS


def test_the_grid_draws_what_a_run_has(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **kwargs: drawn.append(self) or path.touch())
    write_run(tmp_path)
    plot_diagnostics(read_run(tmp_path), tmp_path / "diagnostics.png")
    shown = {axis.get_title(): axis for axis in drawn[0].axes if axis.axison}
    assert len(shown) == 9
    assert all(axis.get_xlabel() == "thousand frames" and axis.get_ylabel() for axis in shown.values())
    lines = {line.get_label(): line.get_ydata() for line in shown["KL divergence"].lines}
    assert list(lines["max_kl"]) == [0.01, 0.01]
    assert list(shown["Factor M before the last agent"].lines[0].get_ydata()) == [0.2] * 24
    assert len(shown["Surrogate's improvement"].lines) == 2
    write_run(tmp_path, max_kl=None, clip_fraction=0.3, cg_residual="", step_fraction="", expected_improvement="")
    plot_diagnostics(read_run(tmp_path), tmp_path / "diagnostics.png")
    titles = {axis.get_title() for axis in drawn[1].axes if axis.axison}
    assert "Clipped rows" in titles
    assert not titles & {"CG residual", "Step fraction"}


@pytest.mark.plots
def test_a_run_draws_its_pictures_at_a_checkpoint(tmp_path, monkeypatch):
    """Without random numbers of the run's, and before it has come to its end."""
    monkeypatch.setattr(plots, "_SHARE_OF_TIME", 100)
    train_until(3, "hatrpo", config("hatrpo", tmp_path, "film=false", "checkpoint.every=2"))
    for name in ("learning_curve.png", "diagnostics.png"):
        assert len(imageio.imread(tmp_path / name)) > 300
    before = GlobalRNGState().state_dict()
    Pictures(tmp_path).draw()
    assert differences(GlobalRNGState().state_dict(), before) == []


def test_pictures_that_cannot_be_drawn_do_not_end_the_run(tmp_path, monkeypatch, caplog):
    def fail(record, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "plot_diagnostics", fail)
    summary = RECIPES["hatrpo"].train(config("hatrpo", tmp_path, "film=false", "checkpoint.every=1"))
    assert summary["frames"] == 240
    assert "could not be drawn: OSError: [Errno 28] No space left on device" in caplog.text


@pytest.mark.plots
def test_drawing_takes_little_of_the_time(tmp_path, monkeypatch):
    """However often it is asked for: a run with short iterations would draw all the time."""
    now = [0.0]
    monkeypatch.setattr(plots.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(plots, "plot_learning_curve", lambda *_: now.__setitem__(0, now[0] + 1))
    monkeypatch.setattr(plots, "plot_diagnostics", lambda *_: drawn.append(now[0]))
    drawn = []
    write_run(tmp_path)
    pictures = Pictures(tmp_path)
    while now[0] < 300:
        now[0] += 0.5
        pictures.draw_now_and_then()
    assert drawn[0] == 34.5, "a short run draws at its end alone"
    assert 7 <= len(drawn) <= 9


def test_a_run_of_an_older_version_is_drawn(tmp_path):
    write_run(tmp_path, columns=COLUMNS[: COLUMNS.index("cpu_s") + 1])
    plot_diagnostics(read_run(tmp_path), tmp_path / "diagnostics.png")
    assert len(imageio.imread(tmp_path / "diagnostics.png")) > 500
