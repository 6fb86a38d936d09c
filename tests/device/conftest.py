"""The device ``fake`` for the tests in this folder, which run in processes of their own: ``make test``."""

from __future__ import annotations

import shutil

import pytest

collect_ignore = ["fakegpu"]
MISSING = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]

if not MISSING:
    from tests.device import fakegpu  # noqa: F401 - registers it


def pytest_collection_modifyitems(items):
    for item in items if MISSING else ():
        item.add_marker(pytest.mark.skip(f"the device is built with g++ and ninja; missing: {', '.join(MISSING)}"))
