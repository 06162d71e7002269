"""PROTOCOL C4 as a table: examples, and every order of messages against a model that remembers everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import RequestCancelledError, SupersededError
from kvrelay_core.request import AttemptId
from kvrelay_worker.attempts import MEMORY_S, AttemptTable


def attempt(number: int, request_id: str = "a") -> AttemptId:
    return AttemptId("router", request_id, number)


def open_attempt(table: AttemptTable[str], number: int, request_id: str = "a") -> tuple[str, str | None]:
    """As a service does it: (the record that serves the attempt, the record that it superseded)."""
    known = table.find(attempt(number, request_id))
    if known is not None:
        return known, None
    record = f"{request_id}{number}"
    return record, table.begin(attempt(number, request_id), record)


def test_the_same_attempt_comes_back_to_its_record() -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    assert open_attempt(table, 1) == ("a1", None)
    assert table.find(attempt(1)) == "a1"


def test_a_higher_attempt_supersedes_and_a_lower_one_is_refused() -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    open_attempt(table, 1)
    assert open_attempt(table, 3) == ("a3", "a1")
    with pytest.raises(SupersededError):
        table.find(attempt(2))


def test_the_late_end_of_a_superseded_attempt_leaves_the_higher_one_alone() -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    open_attempt(table, 1)
    open_attempt(table, 2)
    table.end(attempt(1))
    assert table.find(attempt(2)) == "a2"


def test_a_refused_attempt_may_come_again_and_a_lower_one_may_not() -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    open_attempt(table, 2)
    table.refuse(attempt(2))
    with pytest.raises(SupersededError):
        table.find(attempt(1))
    assert open_attempt(table, 2) == ("a2", None)
    assert table.cancel(attempt(2)) == "a2"
    table.refuse(attempt(2))  # it crossed with the cancel
    with pytest.raises(RequestCancelledError):
        table.find(attempt(2))


def test_a_cancel_that_comes_first_refuses_its_request_for_a_minute() -> None:
    clock = ManualClock()
    table: AttemptTable[str] = AttemptTable(clock)
    assert table.cancel(attempt(1)) is None
    clock.advance(MEMORY_S - 0.1)
    with pytest.raises(RequestCancelledError):
        table.find(attempt(1))
    clock.advance(0.2)
    assert table.find(attempt(1)) is None


def test_a_cancelled_request_may_be_placed_as_a_higher_attempt() -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    table.cancel(attempt(1))
    assert open_attempt(table, 2) == ("a2", None)


def test_cancelling_a_superseded_attempt_spares_the_higher_one() -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    open_attempt(table, 2)
    assert table.cancel(attempt(1)) is None
    assert table.find(attempt(2)) == "a2"


def test_cancelling_a_higher_attempt_aborts_the_lower_one() -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    open_attempt(table, 1)
    assert table.cancel(attempt(2)) == "a1"


def test_promote_moves_the_record_to_the_new_attempt() -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    open_attempt(table, 1)
    table.promote(attempt(1), attempt(2))
    assert table.find(attempt(2)) == "a1"
    with pytest.raises(SupersededError):
        table.find(attempt(1))
    with pytest.raises(SupersededError, match="not above"):
        table.promote(attempt(2), attempt(2))
    with pytest.raises(SupersededError, match="does not run"):
        table.promote(attempt(1), attempt(3))


def test_an_ended_attempt_is_refused_and_forgotten_in_time() -> None:
    clock = ManualClock()
    table: AttemptTable[str] = AttemptTable(clock)
    open_attempt(table, 1)
    table.end(attempt(1))
    with pytest.raises(SupersededError, match="has ended"):
        table.find(attempt(1))
    clock.advance(MEMORY_S)
    assert open_attempt(table, 1) == ("a1", None)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["open", "cancel", "end"]), st.integers(1, 4), st.sampled_from(["a", "b"])), max_size=30
)


@given(ACTIONS)
def test_at_most_one_attempt_of_a_request_lives_and_it_is_the_highest(actions: list[tuple[str, int, str]]) -> None:
    table: AttemptTable[str] = AttemptTable(ManualClock())
    alive: dict[str, int] = {}
    highest: dict[str, int] = {}
    for action, number, request_id in actions:
        top = highest.get(request_id, 0)
        if action == "open" and number > top:
            superseded = open_attempt(table, number, request_id)[1]
            lower = alive.get(request_id)
            assert superseded == (None if lower is None else f"{request_id}{lower}")
            alive[request_id] = highest[request_id] = number
        elif action == "open" and alive.get(request_id) == number:
            assert open_attempt(table, number, request_id) == (f"{request_id}{number}", None)
        elif action == "open":
            with pytest.raises((SupersededError, RequestCancelledError)):
                open_attempt(table, number, request_id)
        elif action == "cancel":
            aborted = table.cancel(attempt(number, request_id))
            expected = alive.pop(request_id, None) if number >= top else None
            assert aborted == (None if expected is None else f"{request_id}{expected}")
            highest[request_id] = max(top, number)
        else:
            table.end(attempt(number, request_id))
            if alive.get(request_id) == number:
                del alive[request_id]
