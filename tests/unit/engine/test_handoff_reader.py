"""The decode side of hand-offs, over a fabric in which reads land when the test says so."""

from __future__ import annotations

import pytest
from handoff_pair import HandoffPair
from handoff_sides import ADDRESS, LAYOUT, first_tokens, make_sequence
from msgspec.structs import replace

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import (
    DeadlineError,
    InternalError,
    LeaseExpiredError,
    MismatchError,
    OverloadedError,
    StaleTicketError,
    TransferError,
    UnsupportedError,
)
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken, ReaderLimits
from kvrelay_engine.messages import (
    ConnectPeer,
    DisconnectPeer,
    Drain,
    HandoffComplete,
    HandoffFailed,
    HandoffReady,
    PeerConnected,
    PeerFailed,
    PrefillStreamClosed,
    ReleaseReason,
)
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.connectors.base import ConnectorOffer, TransferState
from kvrelay_transfer.connectors.memory import MemoryConnector
from kvrelay_transfer.ticket import GroupBlocks, KvTicket

TOKENS = list(range(100, 118))  # 18 tokens: four full blocks and half of one
ONE_BLOCK_READS = ReaderLimits(max_read_bytes=1, max_reads=8)


@pytest.fixture
def pair() -> HandoffPair:
    return HandoffPair()


def finished(pair: HandoffPair, tokens: list[int] = TOKENS) -> tuple[Sequence, KvTicket]:
    """A prefill that is over, followed by the reader, whose messages have arrived."""
    sequence = make_sequence(tokens)
    ticket = pair.side.prefill(sequence)
    decode = pair.open(sequence, ticket)
    pair.carry()
    return decode, ticket


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
    with pytest.raises(UnsupportedError):
        pair.reader.open(make_sequence(TOKENS), replace(ticket, groups=(group, group)))


# --------------------------------------------------------------------------------------------------- stale reads


def broken(pair: HandoffPair) -> HandoffBroken:
    outcome = pair.land()
    assert isinstance(outcome, HandoffBroken)
    return outcome


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


# ---------------------------------------------------------------------------------------- abort and quarantine


def test_an_abort_quarantines_what_is_posted_and_frees_the_rest() -> None:
    pair = HandoffPair(limits=ReaderLimits(max_reads=1, max_read_bytes=1))
    decode, _ = finished(pair)
    pair.poll()
    transfer = pair.only_transfer()
    pair.reader.abort(1)
    pair.reader.abort(1)
    assert transfer.was_aborted
    assert pair.released() is ReleaseReason.CANCELLED
    assert pair.pool.num_in_use == pair.reader.num_quarantined == 1
    assert pair.reader.is_busy and decode.blocks == []

    others = pair.pool.reserve(pair.pool.num_free)
    assert not set(others) & set(transfer.request.local_blocks), "nobody gets a quarantined block"
    pair.pool.release(others)
    transfer.land()
    assert pair.reader.poll() == []
    pair.assert_all_free()


def test_an_abort_before_anything_was_posted_frees_everything(pair: HandoffPair) -> None:
    sequence = make_sequence(TOKENS)
    pair.open(sequence, pair.side.accept(sequence))
    pair.reader.abort(1)
    pair.carry()
    assert pair.reader.poll() == []
    pair.assert_all_free()


def test_a_peer_with_too_much_in_quarantine_is_torn_down() -> None:
    pair = HandoffPair(limits=ReaderLimits(max_quarantined_share=0.25))  # 8 of 32 blocks
    for request_id in (1, 2):
        sequence = make_sequence([request_id * 1000 + token for token in TOKENS], request_id)
        pair.open(sequence, pair.side.prefill(sequence))
        pair.carry(request_id)
        pair.poll()
    pair.reader.abort(1)
    assert pair.reader.num_quarantined == 5
    pair.take_events()
    pair.reader.abort(2)
    failed = [event for event in pair.take_events() if isinstance(event, PeerFailed)]
    assert [event.peer_id for event in failed] == [ADDRESS]
    pair.assert_all_free()
    pair.connect()


def test_closing_the_reader_frees_everything(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.reader.close()
    pair.reader.poll()
    pair.assert_all_free()


# ------------------------------------------------------------------------------------------ links and fallbacks


class Unreachable(MemoryConnector):
    name = "unreachable"

    def connect(self, *_: object) -> object:  # type: ignore[override]
        raise TransferError("not from here")


def test_the_next_connector_is_tried_when_one_cannot_connect() -> None:
    pair = HandoffPair(is_connected=False)
    memory = MemoryConnector(pair.fabric, pair.memory, pair.clock)
    first = Unreachable(pair.fabric, pair.memory, pair.clock)
    fallback = HandoffPair(connectors={"unreachable": first, "memory": memory}, is_connected=False)
    offers = (ConnectorOffer("memory", pair.side.memory.engine_epoch), ConnectorOffer("unreachable", b""))
    fallback.reader.handle(ConnectPeer(pair.side.peer(*offers)))
    fallback.reader.poll()
    assert fallback.take_events() == [PeerConnected(ADDRESS, "memory", 0.0)]
    fallback.reader.handle(ConnectPeer(pair.side.peer(*offers)))
    fallback.reader.poll()
    assert fallback.take_events() == [PeerConnected(ADDRESS, "memory", 0.0)], "asking again is answered again"
    fallback.reader.handle(ConnectPeer(pair.side.peer(offers[1])))
    (failed,) = fallback.take_events()
    assert isinstance(failed, PeerFailed) and "unreachable: not from here" in failed.error.message


def test_a_peer_of_another_layout_is_refused_at_connect(pair: HandoffPair) -> None:
    peer = pair.side.peer(pair.source_connector.offer())
    pair.reader.handle(ConnectPeer(replace(peer, peer_id="other:1", layout=replace(peer.layout, block_tokens=8))))
    (failed,) = pair.take_events()
    assert isinstance(failed, PeerFailed) and failed.error.reason == "MismatchError"
