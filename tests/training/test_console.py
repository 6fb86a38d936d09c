"""What a run prints in a terminal, and elsewhere."""

from __future__ import annotations

import io
import sys

from omegaconf import OmegaConf

from torchrl_trpo.parallel.ranks import ALONE
from torchrl_trpo.training.console import Console

CFG = OmegaConf.create({"train": {"total_frames": 400}, "env": {"name": "vmas/balance"}, "device": "cpu"})
ROW = {"episode_return": 1.234, "kl": 0.0081, "accepted": 1.0, "non_finite": 0, "dropped": 0}


def show(folder):
    console = Console(CFG, "HATRPO", folder, 0, None, ALONE)
    for iteration in (1, 2):
        console.update({**ROW, "iteration": iteration, "frames": 200 * iteration}, 4)
    console.close()


def test_an_iteration_is_a_line_where_there_is_no_terminal(tmp_path, capfd):
    """The bar wrote itself anew into log files, hundreds of times in one line."""
    show(tmp_path)
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines() == [
        f"Training HATRPO on vmas/balance; everything goes to {tmp_path}",
        "Iteration 1, 200 of 400 frames: return 1.23, kl 0.0081, accepted 1.00",
        "Iteration 2, 400 of 400 frames: return 1.23, kl 0.0081, accepted 1.00",
    ]


def test_a_terminal_has_a_progress_bar(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    show(tmp_path)
    assert "100%" in sys.stderr.getvalue()
    assert "return=1.23, kl=0.0081" in sys.stderr.getvalue()
    assert "Iteration" not in capsys.readouterr().out
