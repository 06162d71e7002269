"""The table of faults in docs/operations.md is the matrix that the tests run."""

from __future__ import annotations

from pathlib import Path

from fault_matrix import table

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"
BEGIN, END = "<!-- faults:begin -->\n", "\n<!-- faults:end -->"


def test_the_table_of_faults_is_what_is_tested() -> None:
    shown = OPERATIONS.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.splitlines() == list(table()), "put in its place what `python tests/support/fault_matrix.py` prints"
