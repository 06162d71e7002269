from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvrelay_core.request import FinishReason
from kvrelay_router.committer import Committer, Ending, Token


def offer(committer: Committer, attempt: int, *rows: tuple[int, int]) -> list[int]:
    """Token ids committed by these (position, token id) of choice 0."""
    new = [token for position, id_ in rows for token in committer.offer(attempt, Token(0, position, id_))]
    return [token.token_id for token in new]


def test_the_first_copy_of_a_position_wins() -> None:
    committer = Committer([0])
    assert offer(committer, 0, (0, 10), (0, 99), (1, 11)) == [10, 11]
    assert committer.committed(0) == (10, 11)


def test_the_first_copy_behind_a_gap_wins_too() -> None:
    committer = Committer([0])
    assert offer(committer, 0, (1, 11), (1, 99), (0, 10)) == [10, 11]


def test_a_lower_attempt_is_dropped() -> None:
    committer = Committer([0])
    assert offer(committer, 0, (0, 10)) == [10]
    committer.supersede(0, 2)
    assert offer(committer, 0, (1, 99)) == []
    assert offer(committer, 1, (1, 98)) == []
    assert offer(committer, 2, (1, 11)) == [11]


def test_what_waits_behind_a_gap_dies_with_its_attempt() -> None:
    committer = Committer([0])
    offer(committer, 0, (0, 10), (2, 99))
    assert committer.end(0, Ending(0, FinishReason.STOP, 3)) is None
    committer.supersede(0, 1)
    assert offer(committer, 1, (1, 11)) == [11]
    assert not committer.is_over(0)
    assert offer(committer, 1, (2, 12)) == [12]


def test_an_ending_waits_for_every_token_before_it() -> None:
    committer = Committer([0])
    ending = Ending(0, FinishReason.LENGTH, 2)
    offer(committer, 0, (0, 10))
    assert committer.end(0, ending) is None
    assert offer(committer, 0, (2, 99), (1, 11)) == [11], "nothing stands behind the end"
    assert committer.take_ending(0) == ending
    assert committer.is_over(0)
    assert committer.take_ending(0) is None
    assert committer.end(0, ending) is None
    assert offer(committer, 0, (2, 12)) == []


def test_a_choice_that_the_router_stopped_takes_nothing_more() -> None:
    committer = Committer([0, 1])
    assert committer.stop(0)
    assert not committer.stop(0)
    assert offer(committer, 0, (0, 10)) == []
    assert [token.token_id for token in committer.offer(0, Token(1, 0, 20))] == [20]
    assert not committer.is_over(1)


def test_an_unknown_choice_is_ignored() -> None:
    committer = Committer([0])
    assert committer.offer(0, Token(7, 0, 1)) == []
    assert committer.end(0, Ending(7, FinishReason.STOP, 0)) is None


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), max_size=40))
def test_in_any_order_tokens_come_out_in_order_without_gap_or_copy(rows: list[tuple[int, int]]) -> None:
    committer = Committer([0])
    out = offer(committer, 0, *rows)
    first_copies: dict[int, int] = {}
    for position, id_ in rows:
        first_copies.setdefault(position, id_)
    reachable = next(position for position in range(9) if position not in first_copies)
    assert out == [first_copies[position] for position in range(reachable)]
    assert committer.next_position(0) == reachable
