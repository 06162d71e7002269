"""Who gives way on decode when blocks, or the budget for computing again, run short (PROTOCOL B6, C3, C5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_rig import EnginePair, make_generation, prompt_of
from fake_runner import continuation

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import OverloadedError, TransferError
from kvrelay_core.request import ChoiceState
from kvrelay_engine import messages
from kvrelay_transfer.connectors.base import TransferState

LOST = info_of(TransferError("the stream was lost"))


@pytest.fixture
def pairs() -> Iterator[list[EnginePair]]:
    made: list[EnginePair] = []
    yield made
    for pair in made:
        pair.check_empty()
        pair.close()


def make_pair(pairs: list[EnginePair], **decode: Any) -> EnginePair:
    pairs.append(EnginePair(decode=decode))
    return pairs[-1]


def turn_until(pair: EnginePair, condition: Callable[[], object], max_turns: int = 200) -> None:
    for _ in range(max_turns):
        if condition():
            return
        pair.turn()
    raise AssertionError("the condition did not come true")


def pull_until_posted(pair: EnginePair) -> None:
    pair.lands_reads = False
    turn_until(pair, lambda: pair.fabric.pending)


# ------------------------------------------------------------------------------------- an overloaded source


def test_a_source_that_is_overloaded_in_the_middle_of_a_read_is_a_lost_handoff(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs)
    pair.submit(1, make_generation(prompt_of(12), 6))
    pull_until_posted(pair)
    pair.fabric.pending[0].end(TransferState.FAILED, OverloadedError("no staging slot came free within 30 s"))
    pair.lands_reads = True
    pair.turn()
    assert pair.reader.the(messages.HandoffLost).error.reason == "OverloadedError"
    assert not pair.reader.of(messages.RequestFailed)
    pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0, tuple(pair.answer(1))),)))
    pair.run()
    assert pair.answer(1) == continuation(prompt_of(12), 6)


def test_a_follow_that_was_too_far_behind_is_a_lost_handoff(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs)
    pair.submit(1, make_generation(prompt_of(12), 6))
    pair.turn()
    behind = OverloadedError("the receiver is 1024 messages behind")
    pair.reader.engine.handle(messages.HandoffFailed(1, info_of(behind)))
    pair.run()
    assert pair.reader.the(messages.HandoffLost).error.reason == "OverloadedError"
    assert not pair.reader.of(messages.RequestFailed)
    pair.reader.abort(1)


# ------------------------------------------------------------------------- decoding sequences need the blocks


def crowded(pairs: list[EnginePair]) -> EnginePair:
    """One request decodes, the hand-off of another has all the blocks that are left and waits for its read."""
    pair = make_pair(pairs, kv_blocks=29, max_num_seqs=4, decode_alone_tokens=0)
    pair.submit(1, make_generation(prompt_of(80), 30))
    turn_until(pair, lambda: len(pair.reader.tokens(1)) == 2)
    pair.submit(2, make_generation(prompt_of(24, 2), 4))
    pull_until_posted(pair)
    return pair


def test_a_handoff_that_is_not_here_yet_gives_way_before_a_running_sequence(pairs: list[EnginePair]) -> None:
    pair = crowded(pairs)
    turn_until(pair, lambda: pair.reader.of(messages.RequestFailed))
    assert pair.reader.error(2) == "OverloadedError"
    assert [event.reason for event in pair.reader.of(messages.HandoffRelease) if event.id == 2] == [
        messages.ReleaseReason.REFUSED
    ]
    assert not pair.reader.of(messages.HandedBack)
    assert pair.source.load().leases == 1, "the same ticket can be offered elsewhere"
    pair.fabric.land_all()
    pair.run()
    assert pair.answer(1) == continuation(prompt_of(80), 30)
    ticket = pair.source.of(messages.Accepted)[1].ticket
    assert ticket is not None
    pair.generations[3] = pair.generations[2]
    pair.lands_reads = True
    pair.follow(3, ticket)
    pair.run()
    assert pair.answer(3) == continuation(prompt_of(24, 2), 4)


def test_what_a_read_may_still_write_to_is_not_given_to_the_sequence_that_grows(pairs: list[EnginePair]) -> None:
    pair = crowded(pairs)
    (transfer,) = pair.fabric.pending
    turn_until(pair, lambda: pair.reader.of(messages.RequestFailed))
    load = pair.reader.load()
    assert load.blocks_quarantined == len(transfer.request.local_blocks)
    (running,) = pair.reader.engine.scheduler.running
    assert not set(running.blocks) & set(transfer.request.local_blocks)
    assert not pair.reader.of(messages.HandedBack), "it waits for them"
    num_tokens = len(pair.reader.tokens(1))
    pair.turn()
    assert len(pair.reader.tokens(1)) == num_tokens
    pair.source.abort(2)
    pair.fabric.land_all()
    pair.run()
    assert pair.answer(1) == continuation(prompt_of(80), 30)


# --------------------------------------------------------------------------------- computing again has a cap


def lose(pair: EnginePair, request_id: int, length: int, **generation: Any) -> None:
    pair.submit(request_id, make_generation(prompt_of(length, request_id), 6, **generation))
    pair.turn()
    pair.reader.engine.handle(messages.HandoffFailed(request_id, LOST))
    pair.turn()
    assert pair.reader.of(messages.HandoffLost)[-1].id == request_id


def test_resumed_handoffs_are_capped_together(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs, recompute_tokens=50)
    for request_id in (1, 2, 3):
        lose(pair, request_id, 20)
    for request_id in (1, 2, 3):
        pair.reader.engine.handle(messages.Resume(request_id, (ChoiceState(0),)))
    assert pair.reader.the(messages.HandedBack).id == 3
    pair.run()
    for request_id in (1, 2):
        assert pair.reader.tokens(request_id) == continuation(prompt_of(20, request_id), 6)


def test_a_resumed_handoff_that_is_too_long_is_handed_back(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs, decode_alone_tokens=16)
    lose(pair, 1, 20)
    pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0),)))
    assert pair.reader.the(messages.HandedBack).error.reason == "OverloadedError"
    assert not pair.reader.engine.has_requests


def test_what_was_verified_is_not_counted(pairs: list[EnginePair]) -> None:
    """16 of 24 tokens are here: only the rest would be computed."""
    pair = EnginePair(prefill={"max_batched_tokens": 8}, decode={"decode_alone_tokens": 8})
    pairs.append(pair)
    pair.submit(1, make_generation(prompt_of(24), 6))
    pull_until_posted(pair)
    pair.fabric.pending[0].land()
    turn_until(pair, lambda: pair.source.of(messages.PrefillFinished))
    pair.reader.engine.handle(messages.HandoffFailed(1, LOST))
    pair.turn()
    assert pair.reader.the(messages.HandoffLost).verified_tokens == 16
    pair.lands_reads = True
    pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0),)))
    pair.run()
    assert pair.reader.tokens(1) == continuation(prompt_of(24), 6)


def test_the_tokens_of_all_choices_count(pairs: list[EnginePair]) -> None:
    pair = make_pair(pairs, decode_alone_tokens=20)
    lose(pair, 1, 14, num_choices=2)
    token = continuation(prompt_of(14), 4)
    pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0, tuple(token)), ChoiceState(1, tuple(token)))))
    assert pair.reader.the(messages.HandedBack).id == 1
