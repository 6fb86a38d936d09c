"""The Python blocks of README and docs, each under the comment that stands above it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN: set[tuple[str, str]] = set()
"""The page and the comment of each block that a test has asked for."""


def examples(page: Path) -> list[tuple[str, str]]:
    """The comment and the code of each Python block of a page."""
    return re.findall(r"^(?:<!-- ([^\n]*) -->\n)?```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def example(page: str, name: str) -> Callable:
    """Gives a test the ``code`` of a page's block whose comment is ``name``."""
    (code,) = (code for comment, code in examples(ROOT / page) if comment == name)
    RUN.add((page, name))
    return pytest.mark.parametrize("code", [pytest.param(code, id=f"{page}, {name}")])
