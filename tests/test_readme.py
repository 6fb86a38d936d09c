"""The README is short, and its scores are those that were measured; test_docs.py runs its example."""

from __future__ import annotations

import re
from pathlib import Path

import torchrl_trpo

README = Path(__file__).parents[1] / "README.md"
COMPARISON = README.parent / "docs" / "results" / "comparison.md"


def test_its_scores_are_those_of_the_comparison():
    table = COMPARISON.read_text().split("\n| score | ")[1].splitlines()
    names = [name.strip() for name in table[0].strip("|").split("|")]
    for score, time in (("equal frames", "equal frames"), ("equal time", "equal processor seconds")):
        (row,) = (line for line in README.read_text().splitlines() if line.startswith(f"| score at {score} |"))
        (measured,) = (line for line in table if line.startswith(f"| interquartile mean, {time} |"))
        means = [cell.split()[0] for cell in measured.strip("|").split("|")[1:]]
        assert sorted(re.findall(r"[A-Z]+ \d\.\d\d", row)) == sorted(map(" ".join, zip(names, means, strict=True)))


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) < 120


def test_the_citation_names_the_version():
    assert f"\nversion: {torchrl_trpo.__version__}\n" in (README.parent / "CITATION.cff").read_text()
