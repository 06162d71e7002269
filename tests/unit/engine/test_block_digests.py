"""Digests of blocks: what arrives is compared to the byte with what was sealed, where its source told of it."""

from __future__ import annotations

import pytest
from handoff_pair import FOLLOW, ONE_BLOCK_READS, TOKENS, HandoffPair, broken, finished
from handoff_sides import ADDRESS, LAYOUT, first_tokens, make_sequence
from msgspec.structs import replace

from kvrelay_core.errors import TransferError
from kvrelay_engine.handoff_reader import HandoffArrived
from kvrelay_engine.messages import FollowAttach, FollowComplete, FollowReady
from kvrelay_transfer.block_digest import DIGEST_BYTES, BlockDigest, BlockDigester

NUM_FULL = len(TOKENS) // LAYOUT.block_tokens


def checked(pair: HandoffPair) -> tuple[int, int]:
    (group,) = pair.reader.groups
    return group.num_digests_checked, group.num_digests_wrong


def digests_sent(pair: HandoffPair) -> tuple[BlockDigest, ...]:
    """By the latest Ready."""
    return [event.digests for event in pair.side.events if isinstance(event, FollowReady)][-1]


@pytest.mark.parametrize(("share", "num_checked"), [(0.0, 0), (0.5, NUM_FULL // 2), (1.0, NUM_FULL)])
def test_a_share_of_the_full_blocks_is_checked(share: float, num_checked: int) -> None:
    pair = HandoffPair(digest_share=share)
    decode, ticket = finished(pair)
    assert isinstance(pair.land(), HandoffArrived)
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)
    assert checked(pair) == (num_checked, 0)


def test_a_block_that_lost_a_byte_breaks_the_handoff() -> None:
    pair = HandoffPair(digest_share=1.0, limits=ONE_BLOCK_READS)
    finished(pair)
    pair.poll()
    for transfer in list(pair.fabric.pending):
        transfer.copy_data()
    damaged = pair.fabric.pending[1].request.local_blocks[0]
    pair.memory.block_rows[damaged, -1] ^= 1
    for transfer in list(pair.fabric.pending):
        transfer.read_words()
    outcome = broken(pair)
    assert isinstance(outcome.error, TransferError)
    assert "not what was sealed" in outcome.error.message
    assert outcome.verified_blocks == 1, "what came before it is as good as ever"
    assert checked(pair)[1] == 1
    assert pair.reader.stale_reads == 0


def test_its_connector_is_left_at_once() -> None:
    pair = HandoffPair(digest_share=1.0)
    finished(pair)
    pair.poll()
    pair.only_transfer().copy_data()
    pair.memory.block_rows[pair.only_transfer().request.local_blocks[0], 0] ^= 1
    pair.only_transfer().read_words()
    links = pair.reader.peers
    left: list[tuple[str, str]] = []
    links.distrust = lambda peer_id, connector: left.append((peer_id, connector))  # type: ignore[method-assign]
    broken(pair)
    assert left == [(ADDRESS, "memory")]


def test_a_connector_that_is_distrusted_rests_where_there_is_another() -> None:
    pair = HandoffPair()
    links = pair.reader.peers
    links.distrust(ADDRESS, "memory")
    assert links.failed_reads == 1
    assert links.find(ADDRESS, pair.side.memory.engine_epoch) is not None, "there is no other way"


def test_blocks_found_in_the_cache_are_digested_too() -> None:
    pair = HandoffPair(digest_share=1.0)
    sequence = make_sequence(TOKENS)
    sequence.num_computed = 2 * LAYOUT.block_tokens
    ticket = pair.side.accept(sequence)
    pair.side.source.handle(FollowAttach(FOLLOW, ticket))
    assert {one.block for one in digests_sent(pair)} == set(ticket.groups[0].blocks[:2])


def test_each_ready_tells_all_so_far() -> None:
    pair = HandoffPair(digest_share=1.0)
    sequence = make_sequence(TOKENS)
    ticket = pair.side.accept(sequence)
    pair.side.source.sealed(sequence, 3)
    pair.side.source.handle(FollowAttach(FOLLOW, ticket))
    assert len(digests_sent(pair)) == 3
    pair.side.source.handle(FollowAttach(FOLLOW + 1, ticket))
    assert len(digests_sent(pair)) == 3
    pair.side.source.finished(sequence, first_tokens())
    last = [event for event in pair.side.events if isinstance(event, FollowReady | FollowComplete)][-2:]
    assert isinstance(last[0], FollowReady)
    assert len(last[0].digests) == NUM_FULL, "the partial block may still grow elsewhere"
    assert isinstance(last[1], FollowComplete)


def test_blocks_of_another_size_are_read_unchecked() -> None:
    pair = HandoffPair(digest_share=1.0, layout=replace(LAYOUT, block_tokens=8))
    decode, ticket = finished(pair)
    assert isinstance(pair.land(), HandoffArrived)
    assert pair.holds_kv_of(decode, ticket.groups[0].blocks)
    assert checked(pair) == (0, 0)


def test_a_digest_is_of_every_byte() -> None:
    pair = HandoffPair()
    digester = BlockDigester(pair.memory)
    before = digester.digest(3)
    assert len(before) == DIGEST_BYTES
    pair.memory.block_rows[3, 17] ^= 4
    assert digester.digest(3) != before
    assert digester.digest(2) == digester.digest(4), "both are still zero"
