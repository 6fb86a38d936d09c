"""The check for a real GPU, without one."""

from __future__ import annotations

from tests.gpu_check import Table, main


def test_a_rehearsal(tmp_path):
    """Whoever has a GPU for a quarter of an hour has no time for a script that has rotted."""
    assert main(["--device=cpu", "--small", f"--out={tmp_path}"]) == 0
    told = (tmp_path / "gpu_check.txt").read_text().splitlines()
    assert len(told) > 10
    assert all(line.startswith("ok ") for line in told[1:-1]), told


def test_what_fails_is_told(tmp_path):
    table = Table(tmp_path, seconds=60)
    table.check("one", lambda: "fine")
    table.check("other", lambda: 1 / 0)
    Table(tmp_path, seconds=0).check("late", lambda: "never")
    assert table.failed == 1
    assert "ok   one" in table.lines[0]
    assert "FAIL other" in table.lines[1]
    assert "ZeroDivisionError" in (tmp_path / "errors.txt").read_text()
    assert "SKIP late" in (tmp_path / "gpu_check.txt").read_text()
