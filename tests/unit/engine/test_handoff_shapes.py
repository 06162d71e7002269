"""Hand-offs between pools of other block sizes: a source with smaller blocks than ours, and with larger ones."""

from __future__ import annotations

import pytest
from handoff_pair import HandoffPair, broken, finished
from handoff_sides import LAYOUT, first_tokens, make_sequence
from msgspec.structs import replace

from kvrelay_core.errors import MismatchError, StaleTicketError, UnsupportedError
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken, ReaderLimits
from kvrelay_engine.messages import HandoffReady, ReleaseReason
from kvrelay_engine.pull_plan import PullPlan
from kvrelay_transfer.connectors.base import TransferState

SMALL, LARGE = replace(LAYOUT, block_tokens=2), replace(LAYOUT, block_tokens=16)  # hash units of 8 tokens
TOKENS = list(range(100, 150))  # 50 tokens: 25 small blocks; three large ones and a piece of 2
SMALL_SOURCE = {"source_layout": SMALL, "layout": LARGE, "source_blocks": 64}
LARGE_SOURCE = {"source_layout": LARGE, "layout": SMALL, "num_blocks": 64}
BOTH = pytest.mark.parametrize("shapes", [SMALL_SOURCE, LARGE_SOURCE], ids=["small source", "large source"])


def make_pair(shapes: dict[str, object], **changes: object) -> HandoffPair:
    return HandoffPair(**{**shapes, **changes})  # type: ignore[arg-type]


def warmed(pair: HandoffPair, tokens: list[int]) -> HandoffPair:
    """`tokens` were pulled once and are in the reader's prefix cache."""
    decode, _ = finished(pair, tokens)
    assert isinstance(pair.land(), HandoffArrived)
    pair.take_events()
    pair.pool.release(decode.blocks)
    return pair


# ------------------------------------------------------------------------------------------------ the good way


@BOTH
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 15, 16, 17, 18, 31, 32, 50])
@pytest.mark.parametrize("max_read_bytes", [1, 32 << 20])
def test_a_finished_prefill_is_pulled_whole(shapes: dict[str, object], num_tokens: int, max_read_bytes: int) -> None:
    pair = make_pair(shapes, limits=ReaderLimits(max_read_bytes=max_read_bytes))
    decode, ticket = finished(pair, TOKENS[:num_tokens])
    outcome = pair.land()
    assert isinstance(outcome, HandoffArrived)
    assert decode.num_computed == decode.num_cached == num_tokens
    assert len(decode.blocks) == pair.layout.blocks_for(num_tokens)
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)
    assert (outcome.timing.blocks_pulled, outcome.timing.blocks_reused) == (len(decode.blocks), 0)
    pieces = SMALL.blocks_for(num_tokens)  # what is copied is counted in the smaller blocks
    assert outcome.timing.size_bytes == pieces * SMALL.block_bytes == pair.reader.handoff_bytes
    assert decode.num_published == len(decode.chain.keys())
    assert pair.pool.lookup(decode.chain.keys()) == decode.blocks[: decode.num_published]
    assert pair.released() is ReleaseReason.PULLED
    pair.pool.release(decode.blocks)
    pair.assert_all_free()


def test_small_blocks_are_read_when_they_fill_one_of_ours() -> None:
    pair = make_pair(SMALL_SOURCE)
    sequence = make_sequence(TOKENS, layout=SMALL)
    ticket = pair.side.accept(sequence)
    decode = pair.open(sequence, ticket)
    for num_sealed, num_verified in ((7, 0), (9, 8), (15, 8), (24, 24)):
        pair.side.source.sealed(sequence, num_sealed)
        pair.carry()
        assert pair.land() is None
        assert pair.pool.num_in_use == 4, "all or nothing, at the first block that is ready"
        assert pair.reader.pulled_blocks() == {1: num_verified}, "in blocks of the source"
        assert len(pair.pool.lookup(decode.chain.keys())) == num_verified // 8
    pair.side.source.finished(sequence, first_tokens())
    pair.carry()
    assert isinstance(pair.land(), HandoffArrived)
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)


def test_a_large_block_fills_several_of_ours() -> None:
    pair = make_pair(LARGE_SOURCE)
    sequence = make_sequence(TOKENS, layout=LARGE)
    decode = pair.open(sequence, pair.side.accept(sequence))
    pair.side.source.sealed(sequence, 2)
    pair.carry()
    assert pair.land() is None
    assert pair.pool.num_in_use == 25
    assert pair.reader.pulled_blocks() == {1: 2}
    assert len(pair.pool.lookup(decode.chain.keys())) == 16


# ------------------------------------------------------------------------------------------- our own cached blocks


@BOTH
def test_our_own_cached_blocks_are_not_written_again(shapes: dict[str, object]) -> None:
    """The first 24 tokens are here: one and a half large blocks, twelve small ones."""
    pair = warmed(make_pair(shapes), TOKENS[:24])
    num_reused = 24 // pair.layout.block_tokens
    sequence = make_sequence(TOKENS, request_id=2, layout=pair.side.layout)
    ticket = pair.side.prefill(sequence)
    decode = pair.open(sequence, ticket)
    cached = pair.pool.lookup(decode.chain.keys())
    assert len(cached) == num_reused
    pair.memory.block_rows[cached] = 77
    pair.carry(2)
    outcome = pair.land()
    assert isinstance(outcome, HandoffArrived)
    assert decode.blocks[:num_reused] == cached
    assert bool((pair.memory.block_rows[cached] == 77).all()), "others may be reading them"
    num_blocks = pair.layout.blocks_for(50)
    assert (outcome.timing.blocks_reused, outcome.timing.blocks_pulled) == (num_reused, num_blocks - num_reused)
    first = num_reused * pair.layout.block_tokens
    assert outcome.timing.size_bytes == SMALL.blocks_for(50 - first) * SMALL.block_bytes
    decode.blocks, decode.num_computed = decode.blocks[num_reused:], 50 - first
    kept = ticket.groups[0].blocks
    if first % pair.side.layout.block_tokens == 0:
        assert pair.holds_kv_of(decode, kept[first // pair.side.layout.block_tokens :])


def test_a_prompt_that_is_all_here_reads_nothing() -> None:
    """Also the source's last block, which is partial there, and full in ours."""
    pair = warmed(make_pair(LARGE_SOURCE), TOKENS[:24])
    decode, _ = finished(pair, TOKENS[:24])
    outcome = pair.poll()
    assert isinstance(outcome, HandoffArrived)
    assert (outcome.timing.blocks_reused, outcome.timing.size_bytes) == (12, 0)
    assert len(decode.blocks) == 12


# ------------------------------------------------------------------------------------------------- bad ends


@BOTH
@pytest.mark.parametrize("piece", [1, 2])
def test_a_block_reused_before_its_read_is_stale_and_what_came_before_is_kept(
    shapes: dict[str, object], piece: int
) -> None:
    """The source reuses the block with token 16 * piece; every 16 tokens are one read."""
    pair = make_pair(shapes, limits=ReaderLimits(max_read_bytes=1))
    decode, ticket = finished(pair, TOKENS)
    pair.side.overwrite(ticket.groups[0].blocks[16 * piece // pair.side.layout.block_tokens])
    outcome = broken(pair)
    assert isinstance(outcome.error, StaleTicketError) and pair.reader.stale_reads == 1
    assert outcome.verified_tokens == decode.num_computed == 16 * piece
    assert outcome.verified_blocks == len(decode.blocks) == 16 * piece // pair.layout.block_tokens
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)
    pair.pool.release(decode.blocks)
    pair.assert_all_free()


@BOTH
def test_a_block_reused_during_its_read_is_stale(shapes: dict[str, object]) -> None:
    pair = make_pair(shapes)
    _, ticket = finished(pair, TOKENS)
    pair.poll()
    pair.only_transfer().copy_data()
    pair.side.overwrite(ticket.groups[0].blocks[1])
    pair.only_transfer().read_words()
    outcome = broken(pair)
    assert isinstance(outcome.error, StaleTicketError) and outcome.verified_blocks == 0
    pair.assert_all_free()


def test_a_source_that_is_lost_leaves_whole_blocks_of_ours() -> None:
    """All 24 small blocks of 48 tokens are verified before the end is known; ours have 16 tokens or 32."""
    for our_tokens, num_kept in ((16, 3), (32, 1)):
        pair = make_pair(SMALL_SOURCE, layout=replace(LAYOUT, block_tokens=our_tokens))
        sequence = make_sequence(TOKENS[:48], layout=SMALL)
        decode = pair.open(sequence, pair.side.accept(sequence))
        pair.side.source.sealed(sequence, 24)
        pair.carry()
        assert pair.land() is None
        pair.side.source.failed(1, StaleTicketError("lost"))
        pair.carry()
        outcome = pair.poll()
        assert isinstance(outcome, HandoffBroken)
        assert (outcome.verified_blocks, outcome.verified_tokens) == (num_kept, num_kept * our_tokens)
        pair.pool.release(decode.blocks)
        pair.assert_all_free()


@BOTH
def test_an_abort_quarantines_each_block_once(shapes: dict[str, object]) -> None:
    pair = make_pair(shapes, limits=ReaderLimits(max_read_bytes=1, max_reads=3, max_quarantined_share=1.0))
    finished(pair, TOKENS)
    pair.poll()
    posted = [block for read in pair.fabric.pending for block in dict.fromkeys(read.request.local_blocks)]
    assert len(posted) == len(set(posted)) == 48 // pair.layout.block_tokens
    pair.reader.abort(1)
    assert pair.reader.num_quarantined == pair.pool.num_in_use == len(posted)
    for read in list(pair.fabric.pending):
        read.end(TransferState.FAILED, StaleTicketError("over"))
    pair.reader.poll()
    pair.assert_all_free()


# ------------------------------------------------------------------------------------------- what does not fit


@BOTH
def test_a_ticket_must_have_the_layout_of_its_source(shapes: dict[str, object]) -> None:
    """Blocks are looked up in the pool that the handshake described."""
    pair = make_pair(shapes)
    other = make_pair({**shapes, "source_layout": LAYOUT})
    sequence = make_sequence(TOKENS)
    ticket = replace(other.side.prefill(sequence), engine_epoch=pair.side.memory.engine_epoch)
    pair.reader.open(make_sequence(TOKENS, layout=pair.layout), ticket)
    pair.reader.handle(HandoffReady(1, (4,)))
    outcome = pair.poll()
    assert isinstance(outcome, HandoffBroken) and isinstance(outcome.error, MismatchError)
    pair.assert_all_free()


@BOTH
def test_blocks_of_a_ticket_are_counted_by_its_own_layout(shapes: dict[str, object]) -> None:
    pair = make_pair(shapes)
    ticket = pair.side.prefill(make_sequence(TOKENS, layout=pair.side.layout))
    with pytest.raises(MismatchError, match="does not list"):
        pair.reader.open(make_sequence(TOKENS, layout=pair.layout), replace(ticket, layout=pair.layout))


def test_a_source_of_several_ranks_is_not_supported_yet() -> None:
    ranked = replace(LAYOUT, num_kv_heads=1, tp_size=2)
    with pytest.raises(UnsupportedError, match="rank 0 of 2"):
        PullPlan(ranked, LAYOUT, 50)
