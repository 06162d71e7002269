from __future__ import annotations

from kvrelay_router.encoder_choice import EncoderChoice

NOBODY: frozenset[str] = frozenset()


def test_the_holder_gets_its_items_and_the_idlest_the_others() -> None:
    choice = EncoderChoice()
    choice.note("a", b"cat")
    choice.loads.charge("a", 50)
    assert choice.assign({b"cat": 9, b"dog": 9}, ["a", "b"], NOBODY) == {"a": [b"cat"], "b": [b"dog"]}


def test_what_is_assigned_at_once_counts_as_load_at_once() -> None:
    assigned = EncoderChoice().assign({b"1": 10, b"2": 6, b"3": 6, b"4": 4}, ["a", "b"], NOBODY)
    assert assigned == {"a": [b"1", b"4"], "b": [b"2", b"3"]}


def test_avoided_encoders_get_something_only_when_there_is_no_other() -> None:
    choice = EncoderChoice()
    choice.note("a", b"cat")
    assert choice.assign({b"cat": 1}, ["a", "b"], frozenset("a")) == {"b": [b"cat"]}
    assert choice.assign({b"cat": 1}, ["a"], frozenset("a")) == {"a": [b"cat"]}


def test_a_holder_that_does_not_serve_is_passed_over() -> None:
    choice = EncoderChoice()
    choice.note("gone", b"cat")
    assert choice.assign({b"cat": 1}, ["b"], NOBODY) == {"b": [b"cat"]}


def test_the_memory_is_bounded_and_the_latest_items_stay() -> None:
    choice = EncoderChoice(max_items=2)
    for item in (b"1", b"2", b"1", b"3"):
        choice.note("b", item)
    assert choice.assign({b"1": 1, b"2": 1, b"3": 1}, ["a", "b"], NOBODY) == {"b": [b"1", b"3"], "a": [b"2"]}
