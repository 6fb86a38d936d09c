"""Links lead somewhere, as GitHub and Sphinx follow them, and the files that are named exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "objectives", "recipes", "tests", "torchrl_trpo")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [path for folder in FOLDERS for kind in ("md", "py", "yaml") for path in (ROOT / folder).rglob(f"*.{kind}")]


@cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Those of the headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"`[^`]*`", "", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"https?://", link):
            continue  # make linkcheck asks for these
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_file_that_a_page_names_exists():
    for page in PAGES:
        if page.name != "CHANGELOG.md":  # which tells of files that are gone
            for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", prose(page)):
                assert (ROOT / path).exists(), (page, path)


def test_every_page_that_the_code_names_exists():
    for source in [*SOURCES, ROOT / "Makefile"]:
        for path in re.findall(r"\bdocs/[\w/-]+\.md\b", source.read_text()):
            assert (ROOT / path).exists(), (source, path)
