"""Hand-offs that cannot complete: stale blocks, lost sources, messages that make no sense."""

from __future__ import annotations

import pytest
from handoff_pair import ONE_BLOCK_READS, TOKENS, HandoffPair, broken, finished
from handoff_sides import ADDRESS, first_tokens, make_sequence
from msgspec.structs import replace

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import (
    DeadlineError,
    InternalError,
    LeaseExpiredError,
    MismatchError,
    StaleTicketError,
    TransferError,
)
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken
from kvrelay_engine.messages import (
    ConnectPeer,
    DisconnectPeer,
    Drain,
    HandoffComplete,
    HandoffFailed,
    HandoffReady,
    PrefillStreamClosed,
    ReleaseReason,
)
from kvrelay_transfer.connectors.base import ConnectorOffer, TransferState
from kvrelay_transfer.ticket import GroupBlocks


@pytest.fixture
def pair() -> HandoffPair:
    return HandoffPair()


# --------------------------------------------------------------------------------------------------- stale reads


def test_a_block_reused_before_the_read_is_stale(pair: HandoffPair) -> None:
    decode, ticket = finished(pair)
    pair.side.overwrite(ticket.groups[0].blocks[1])
    outcome = broken(pair)
    assert isinstance(outcome.error, StaleTicketError)
    assert (outcome.verified_blocks, outcome.verified_tokens) == (0, 0)
    assert decode.blocks == [] and decode.num_computed == 0
    assert pair.pool.num_cached == 0, "nothing of it became visible"
    assert pair.reader.stale_reads == 1
    assert pair.released() is ReleaseReason.FAILED
    pair.assert_all_free()


def test_a_block_reused_during_the_read_is_stale(pair: HandoffPair) -> None:
    decode, ticket = finished(pair)
    pair.poll()
    transfer = pair.only_transfer()
    transfer.copy_data()
    pair.side.overwrite(ticket.groups[0].blocks[0])
    transfer.read_words()
    assert isinstance(broken(pair).error, StaleTicketError)
    assert decode.blocks == [] and pair.pool.num_cached == 0
    pair.assert_all_free()


def test_a_stale_partial_block_is_stale(pair: HandoffPair) -> None:
    _, ticket = finished(pair)
    pair.side.overwrite(ticket.groups[0].blocks[4])
    assert isinstance(broken(pair).error, StaleTicketError)


def test_chunks_verified_before_are_kept() -> None:
    pair = HandoffPair(limits=ONE_BLOCK_READS)
    decode, ticket = finished(pair)
    pair.side.overwrite(ticket.groups[0].blocks[2])
    outcome = broken(pair)
    assert isinstance(outcome.error, StaleTicketError)
    assert (outcome.verified_blocks, outcome.verified_tokens) == (2, 8)
    assert len(decode.blocks) == 2 and decode.num_computed == 8
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)
    assert pair.pool.lookup(decode.chain.keys()) == decode.blocks
    pair.pool.release(decode.blocks)
    pair.assert_all_free()


def test_a_gap_in_what_has_landed_counts_only_up_to_it() -> None:
    pair = HandoffPair(limits=ONE_BLOCK_READS)
    decode, _ = finished(pair)
    pair.poll()
    reads = list(pair.fabric.pending)
    for index in (0, 2, 3):
        reads[index].land()
    reads[1].end(TransferState.FAILED, TransferError("lost"))
    assert pair.poll() is None
    [again] = [read for read in pair.fabric.pending if read.request.remote_blocks == reads[1].request.remote_blocks]
    again.end(TransferState.FAILED, TransferError("lost again"))
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken) and outcome.verified_blocks == 1
    assert pair.reader.num_quarantined == 1, "the last read is still under way"
    reads[4].land()
    pair.poll()
    pair.pool.release(decode.blocks)
    pair.assert_all_free()


# --------------------------------------------------------------------------------------- failures and lost sources


def test_a_failure_at_the_source_breaks_the_hand_off(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    ticket = pair.side.accept(sequence)
    decode = pair.open(sequence, ticket)
    pair.side.source.sealed(sequence, 2)
    pair.carry()
    assert pair.land() is None
    pair.side.source.handle(PrefillStreamClosed(1))
    pair.clock.advance(3.0)
    pair.side.source.tick()
    pair.carry()
    outcome = broken(pair)
    assert isinstance(outcome.error, LeaseExpiredError)
    assert outcome.verified_blocks == 2 and pair.holds_kv_of(decode, ticket.groups[0].blocks)


def test_a_source_that_is_lost_when_everything_is_here_does_no_harm(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.fabric.land_all()
    pair.reader.handle(HandoffFailed(1, info_of(TransferError("gone"))))
    assert isinstance(pair.poll(), HandoffArrived)


def test_a_lost_follow_before_anything_is_ready(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    pair.open(sequence, pair.side.accept(sequence))
    pair.reader.handle(HandoffFailed(1, info_of(TransferError("gone"))))
    assert pair.reader.is_busy
    assert broken(pair).verified_blocks == 0
    pair.assert_all_free()


def test_a_read_that_misses_its_deadline_breaks_the_hand_off(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.clock.advance(60.0)
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken) and isinstance(outcome.error, DeadlineError)
    pair.assert_all_free()


def test_a_read_that_has_failed_but_can_still_land_breaks_the_hand_off_and_is_quarantined(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    transfer = pair.only_transfer()
    transfer.error = DeadlineError("nothing came")
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken) and isinstance(outcome.error, DeadlineError)
    assert pair.reader.num_quarantined == len(transfer.request.local_blocks) and transfer.was_aborted
    transfer.land()
    assert pair.reader.poll() == []
    pair.assert_all_free()


def test_a_disconnected_peer_tears_its_reads_down(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.reader.handle(DisconnectPeer(ADDRESS))
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken) and isinstance(outcome.error, TransferError)
    pair.assert_all_free()


def test_a_peer_that_restarts_ends_reads_of_its_former_start(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    restarted = HandoffPair()
    pair.fabric.expose(restarted.side.memory.engine_epoch, restarted.side.memory)
    offer = ConnectorOffer("memory", restarted.side.memory.engine_epoch)
    pair.reader.handle(ConnectPeer(restarted.side.peer(offer)))
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken)
    assert pair.reader.num_transfers == 0

    sequence = make_sequence(TOKENS, request_id=2)
    pair.reader.open(make_sequence(TOKENS, request_id=2), pair.side.prefill(sequence))
    pair.reader.handle(HandoffReady(2, (4,)))
    assert pair.poll() is None, "a ticket of the former start is not read over the new link"
    pair.clock.advance(5.0)
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken) and "not connected in time" in outcome.error.message


def test_a_hand_off_waits_for_its_peer() -> None:
    pair = HandoffPair(is_connected=False)
    decode, ticket = finished(pair)
    assert pair.poll() is None
    pair.clock.advance(4.0)
    assert pair.poll() is None
    pair.connect()
    assert isinstance(pair.land(), HandoffArrived)
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)


def test_a_peer_that_cannot_be_reached_breaks_the_hand_off_at_once(pair: HandoffPair) -> None:
    finished(pair)
    pair.reader.handle(ConnectPeer(replace(pair.side.peer(), engine_epoch=b"f" * 16)))
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken) and "no connector in common" in outcome.error.message


# ------------------------------------------------------------------------------------------- strange messages


def test_messages_for_requests_that_are_over_are_ignored(pair: HandoffPair) -> None:
    pair.reader.handle(HandoffReady(99, (1,)))
    pair.reader.handle(HandoffComplete(99, first_tokens(), ()))
    pair.reader.handle(HandoffFailed(99, info_of(TransferError("x"))))
    assert pair.reader.poll() == [] and not pair.reader.is_busy


def test_duplicate_and_falling_ready_change_nothing(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    pair.open(sequence, pair.side.accept(sequence))
    pair.carry()
    for num_blocks in (3, 3, 1, 0):
        pair.reader.handle(HandoffReady(1, (num_blocks,)))
        pair.poll()
    assert len(pair.only_transfer().request.local_blocks) == 3


def test_complete_before_ready_and_twice(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    ticket = pair.side.accept(sequence)
    pair.open(sequence, ticket)
    group = ticket.groups[0]
    complete = HandoffComplete(1, first_tokens(), (GroupBlocks(0, 16, group.blocks[4:], group.words[4:]),))
    pair.reader.handle(complete)
    pair.reader.handle(complete)
    pair.reader.handle(HandoffReady(1, (2,)))
    assert isinstance(pair.land(), HandoffArrived)


@pytest.mark.parametrize("num_blocks", [(5,), (), (1, 1)])
def test_ready_beyond_the_ticket_is_a_mismatch(pair: HandoffPair, num_blocks: tuple[int, ...]) -> None:
    sequence = make_sequence(TOKENS)
    pair.open(sequence, pair.side.accept(sequence))
    pair.reader.handle(HandoffReady(1, num_blocks))
    assert isinstance(broken(pair).error, MismatchError)
    pair.assert_all_free()


def test_a_partial_block_that_was_not_signed_is_a_mismatch(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    ticket = pair.side.accept(sequence)
    pair.open(sequence, ticket)
    group = ticket.groups[0]
    planted = GroupBlocks(0, 16, group.blocks[:1], group.words[:1])
    pair.reader.handle(HandoffComplete(1, first_tokens(), (planted,)))
    assert isinstance(broken(pair).error, MismatchError)


def test_too_few_first_tokens_are_a_mismatch(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS[:16], num_choices=2)
    pair.open(sequence, pair.side.accept(sequence))
    pair.reader.handle(HandoffComplete(1, first_tokens(1), ()))
    assert isinstance(broken(pair).error, MismatchError)


def test_a_command_for_somebody_else_is_a_bug(pair: HandoffPair) -> None:
    with pytest.raises(InternalError, match="Drain"):
        pair.reader.handle(Drain())
