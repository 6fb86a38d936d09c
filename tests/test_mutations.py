"""The list of deliberate mistakes."""

from pathlib import Path

from tests.mutations import MUTATIONS, ROOT


def test_each_mistake_can_be_made():
    """One whose place has changed would not be tried."""
    found = {each.name: Path(ROOT, each.file).read_text().count(each.old) for each in MUTATIONS}
    assert {name for name, count in found.items() if count != 1} == set()
