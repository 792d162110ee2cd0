"""The README says what the committed records say."""

from __future__ import annotations

from benchmarks import tables


def test_the_tables_are_those_of_the_committed_records():
    text = tables.README.read_text()
    assert tables.rendered(text) == text, "run python -m benchmarks.tables"
