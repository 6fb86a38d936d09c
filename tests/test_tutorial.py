"""The tutorial is a notebook that runs from top to bottom, and shows what it says it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from myst_nb.core.read import read_myst_markdown_notebook
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.mark.slow  # make docs executes it too, and stops at an error
def test_the_tutorial_runs_and_shows_a_curve_and_a_film():
    notebook = read_myst_markdown_notebook(TUTORIAL.read_text())
    NotebookClient(notebook, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 1
    assert shown.count("image/gif") == 1
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert printed.count("'frames': ") == 3  # updates
    assert "accepted              [1, 1, 1, 1]" in printed
