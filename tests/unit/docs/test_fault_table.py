"""The tables of faults in docs/operations.md are the matrix that the tests run."""

from __future__ import annotations

from pathlib import Path

from fault_matrix import runs, table

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


def shown(name: str) -> list[str]:
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    return OPERATIONS.read_text().partition(begin)[2].partition(end)[0].splitlines()


def test_the_tables_of_faults_are_what_is_tested() -> None:
    why = "put in its place what `python tests/support/fault_matrix.py` prints"
    assert shown("faults") == list(table()), why
    assert shown("fault-runs") == list(runs()), why
