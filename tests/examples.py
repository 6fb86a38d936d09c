"""The Python blocks of README and docs, each under the comment that stands above it."""

from __future__ import annotations

import re
import shlex
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


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The recipe and the settings of each command of a page that begins a run, without those that a shell fills in."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    recipes = re.findall(r"-m torchrl_trpo\.recipes\.(\w+)([^\n;&]*)", text)
    makes = re.findall(r'^make train(?: ALGO=(\w+))?(?: ARGS="(.*?)")?', text, re.MULTILINE)
    found = []
    for name, arguments in [*recipes, *((name or "hatrpo", arguments) for name, arguments in makes)]:
        settings = [each for each in shlex.split(arguments, comments=True) if "$" not in each]
        if not any(each.startswith(("resume=", "-")) for each in settings):
            found.append((name, settings))
    return found


def example(page: str, name: str) -> Callable:
    """Gives a test the ``code`` of a page's block whose comment is ``name``."""
    (code,) = (code for comment, code in examples(ROOT / page) if comment == name)
    RUN.add((page, name))
    return pytest.mark.parametrize("code", [pytest.param(code, id=f"{page}, {name}")])
