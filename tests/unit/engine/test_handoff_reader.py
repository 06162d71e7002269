"""The decode side of hand-offs, over a fabric in which reads land when the test says so."""

from __future__ import annotations

import pytest
from handoff_pair import TOKENS, HandoffPair, broken, finished
from handoff_sides import LAYOUT, first_tokens, make_sequence
from msgspec.structs import replace

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import (
    MismatchError,
    OverloadedError,
)
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken, ReaderLimits
from kvrelay_engine.messages import (
    HandoffFailed,
    ReleaseReason,
)
from kvrelay_transfer.connectors.base import PeerLink, ReadWindow, TransferState


@pytest.fixture
def pair() -> HandoffPair:
    return HandoffPair()


# ------------------------------------------------------------------------------------------------ the good way


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 16, 17, 63, 64])
def test_a_finished_prefill_is_pulled_whole(pair: HandoffPair, num_tokens: int) -> None:
    decode, ticket = finished(pair, list(range(num_tokens)))
    outcome = pair.land()
    assert isinstance(outcome, HandoffArrived)
    assert (outcome.request_id, outcome.first_tokens) == (1, first_tokens())
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)
    num_blocks = len(ticket.groups[0].blocks)
    assert len(decode.blocks) == num_blocks
    assert decode.num_computed == decode.num_cached == num_tokens
    assert (outcome.timing.blocks_pulled, outcome.timing.blocks_reused) == (num_blocks, 0)
    assert outcome.timing.size_bytes == num_blocks * ticket.layout.block_bytes == pair.reader.handoff_bytes
    assert outcome.timing.connector == "memory"
    assert pair.released() is ReleaseReason.PULLED
    pair.pool.release(decode.blocks)
    pair.assert_all_free()


def test_blocks_are_pulled_while_prefill_computes(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    ticket = pair.side.accept(sequence)
    decode = pair.open(sequence, ticket)
    pair.carry()
    assert pair.poll() is None
    assert pair.pool.num_in_use == 0, "nothing is reserved before something is ready"

    for num_sealed in (1, 3):
        pair.side.source.sealed(sequence, num_sealed)
        pair.carry()
        assert pair.land() is None
        assert pair.pool.num_in_use == 5, "all or nothing"
        assert pair.reader.pulled_blocks() == {1: num_sealed}
    assert decode.blocks == []

    pair.side.source.finished(sequence, first_tokens())
    pair.carry()
    assert isinstance(pair.land(), HandoffArrived)
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)


def test_the_time_of_a_hand_off_is_that_of_its_reads(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    pair.open(sequence, pair.side.accept(sequence))
    pair.side.source.sealed(sequence, 2)
    pair.carry()
    pair.poll()
    pair.clock.advance(0.25)
    pair.fabric.land_all()
    pair.poll()
    pair.clock.advance(4.0)  # prefill computes
    pair.side.source.finished(sequence, first_tokens())
    pair.carry()
    pair.poll()
    pair.clock.advance(0.5)
    outcome = pair.land()
    assert isinstance(outcome, HandoffArrived)
    assert outcome.timing.seconds == pair.reader.handoff_s == 0.75


def test_reads_are_bounded_in_size_and_number() -> None:
    pair = HandoffPair(limits=ReaderLimits(max_reads=2, max_read_bytes=3 * LAYOUT.block_bytes))
    finished(pair, list(range(40)))
    pair.poll()
    assert [len(read.request.local_blocks) for read in pair.fabric.pending] == [3, 3]
    pair.fabric.pending[1].land()
    pair.poll()
    assert [len(read.request.local_blocks) for read in pair.fabric.pending] == [3, 3]
    pair.fabric.land_all()
    pair.poll()
    assert [len(read.request.local_blocks) for read in pair.fabric.pending] == [1]
    assert isinstance(pair.land(), HandoffArrived)


def test_reads_are_as_suits_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeerLink, "window", ReadWindow(max_reads=3, max_read_bytes=2 * LAYOUT.block_bytes))
    pair = HandoffPair()
    finished(pair, list(range(40)))
    pair.poll()
    assert [len(read.request.local) for read in pair.fabric.pending] == [2, 2, 2]
    assert isinstance(pair.land(), HandoffArrived)


def test_our_own_cached_blocks_are_not_pulled_again(pair: HandoffPair) -> None:
    first, _ = finished(pair)
    assert isinstance(pair.land(), HandoffArrived)
    pair.take_events()
    pair.pool.release(first.blocks)

    longer = make_sequence([*TOKENS[:16], 7, 8, 9, 10], request_id=2)
    ticket = pair.side.prefill(longer)
    decode = pair.open(longer, ticket)
    pair.carry(2)
    outcome = pair.land()
    assert isinstance(outcome, HandoffArrived)
    assert (outcome.timing.blocks_reused, outcome.timing.blocks_pulled) == (4, 1)
    assert decode.blocks[:4] == first.blocks[:4]
    assert all(pair.pool.references(block) == 1 for block in decode.blocks)


def test_pulled_blocks_enter_the_prefix_cache_when_verified(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    decode = pair.open(sequence, pair.side.accept(sequence))
    keys = sequence.chain.keys()
    pair.side.source.sealed(sequence, 3)
    pair.carry()
    pair.poll()
    assert pair.pool.lookup(keys) == []
    pair.land()
    assert len(pair.pool.lookup(keys)) == 3
    pair.side.source.finished(sequence, first_tokens())
    pair.carry()
    pair.land()
    assert pair.pool.lookup(keys) == decode.blocks[:4]
    assert decode.num_published == 4


def test_several_choices_bring_several_first_tokens(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS, num_choices=3)
    pair.open(sequence, pair.side.prefill(sequence, num_choices=3))
    pair.carry()
    outcome = pair.land()
    assert isinstance(outcome, HandoffArrived) and outcome.first_tokens == first_tokens(3)


# ------------------------------------------------------------------------------------------- tickets that do not fit


def test_a_ticket_for_other_tokens_is_a_mismatch(pair: HandoffPair) -> None:
    ticket = pair.side.prefill(make_sequence(TOKENS))
    other = [*TOKENS[:5], 9999, *TOKENS[6:]]
    with pytest.raises(MismatchError, match="hashes"):
        pair.reader.open(make_sequence(other), ticket)
    with pytest.raises(MismatchError, match="18 tokens"):
        pair.reader.open(make_sequence(TOKENS[:17]), ticket)
    assert not pair.reader.pulled_blocks()


def test_a_ticket_of_another_model_or_layout_is_a_mismatch(pair: HandoffPair) -> None:
    ticket = pair.side.prefill(make_sequence(TOKENS))
    with pytest.raises(MismatchError, match="another model"):
        pair.reader.open(make_sequence(TOKENS), replace(ticket, model_fingerprint=b"other"))
    with pytest.raises(MismatchError, match="head_dim"):
        pair.reader.open(make_sequence(TOKENS), replace(ticket, layout=replace(ticket.layout, head_dim=16)))


def test_a_ticket_that_does_not_list_its_blocks_is_a_mismatch(pair: HandoffPair) -> None:
    ticket = pair.side.prefill(make_sequence(TOKENS))
    group = ticket.groups[0]
    for wrong in (
        replace(group, blocks=group.blocks[:4]),
        replace(group, words=group.words[:4]),
        replace(group, first_token=4),
        replace(group, blocks=(0, *group.blocks[1:])),
    ):
        with pytest.raises(MismatchError, match="does not list"):
            pair.reader.open(make_sequence(TOKENS), replace(ticket, groups=(wrong,)))
    with pytest.raises(MismatchError, match="does not list"):
        pair.reader.open(make_sequence(TOKENS), replace(ticket, groups=(group, group)))
    with pytest.raises(MismatchError, match="the source has 2 KV groups, this worker 1"):
        pair.reader.open(make_sequence(TOKENS), replace(ticket, groups=(group, group), more_layouts=(ticket.layout,)))


# -------------------------------------------------------------------------------------------- room and refusals


def test_without_room_the_ticket_is_refused_after_the_budget(pair: HandoffPair) -> None:
    pair.room = 4
    decode, _ = finished(pair)
    assert pair.poll() is None
    pair.clock.advance(1.5)
    assert pair.poll() is None
    pair.clock.advance(0.5)
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken) and isinstance(outcome.error, OverloadedError)
    assert outcome.is_refused
    assert pair.released() is ReleaseReason.REFUSED
    assert decode.blocks == []
    pair.assert_all_free()


def test_room_that_comes_in_time_is_used(pair: HandoffPair) -> None:
    pair.room = 4
    finished(pair)
    pair.poll()
    pair.clock.advance(1.5)
    pair.poll()
    pair.room = 5
    assert isinstance(pair.land(), HandoffArrived)


def test_a_failed_reservation_keeps_no_cached_block_pinned(pair: HandoffPair) -> None:
    first, _ = finished(pair)
    pair.land()
    pair.take_events()
    pair.pool.release(first.blocks)
    pair.room = 0
    longer = make_sequence([*TOKENS[:16], 1, 2, 3], request_id=2)
    pair.open(longer, pair.side.prefill(longer))
    pair.carry(2)
    assert pair.poll() is None
    assert pair.pool.num_in_use == 0


def test_only_a_want_of_room_is_a_refusal(pair: HandoffPair) -> None:
    """A source that is overloaded itself, before or in the middle of the pull, is a lost hand-off."""
    overloaded = OverloadedError("no staging slot came free within 30 s")
    sequence = make_sequence(TOKENS)
    pair.open(sequence, pair.side.accept(sequence))
    pair.reader.handle(HandoffFailed(1, info_of(overloaded)))
    outcome = broken(pair)
    assert isinstance(outcome.error, OverloadedError) and not outcome.is_refused
    assert pair.released() is ReleaseReason.FAILED

    finished(pair)
    pair.poll()
    pair.only_transfer().end(TransferState.FAILED, overloaded)
    outcome = broken(pair)
    assert isinstance(outcome.error, OverloadedError) and not outcome.is_refused
    assert pair.released() is ReleaseReason.FAILED
    pair.assert_all_free()
