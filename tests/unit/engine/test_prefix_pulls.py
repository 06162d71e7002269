"""KV of a prompt's beginning goes from one engine's prefix cache to another's: unpinned, fenced, never an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from handoff_sides import ADDRESS, LAYOUT, MODEL, SourceSide, first_tokens, make_memory, make_sequence
from msgspec.structs import replace

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import DeadlineError, LeaseExpiredError, TicketRejectedError, TransferError
from kvrelay_core.request import MediaReference, PrefixHint
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.handoff_peers import PeerLinks
from kvrelay_engine.messages import Event, FollowAttach, FollowFailed
from kvrelay_engine.prefix_cache import PrefixCache
from kvrelay_engine.prefix_messages import LookupPrefix, PrefixFound, PrefixTicket, PrefixWanted
from kvrelay_engine.prefix_pulls import PrefixPulls, PullLimits
from kvrelay_engine.sequence import Sequence
from kvrelay_engine.throughput import Throughput
from kvrelay_transfer.connectors.base import TransferState
from kvrelay_transfer.connectors.memory import MemoryConnector, MemoryFabric
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import KvTicket

UNIT = LAYOUT.hash_unit_tokens  # 8 tokens, 2 blocks
TOKENS = list(range(100, 139))  # 4 full units and 7 tokens
HINT = PrefixHint(ADDRESS, 4 * UNIT)


class TwoEngines:
    """The source has computed TOKENS, and the request that did is over; the reader starts empty."""

    def __init__(self, source_layout: KvLayout = LAYOUT) -> None:
        self.clock = ManualClock()
        self.side = SourceSide(self.clock, 64, layout=source_layout)
        self.leave_in_cache(TOKENS)
        self.memory = make_memory(24)
        self.pool = BlockPool(24, self.memory.words)
        self.cache = PrefixCache(self.pool, LAYOUT, MODEL)
        self.events: list[Event] = []
        self.fabric = MemoryFabric()
        self.source_connector = MemoryConnector(self.fabric, self.side.memory, self.clock)
        self.connector = MemoryConnector(self.fabric, self.memory, self.clock)
        self.peers = PeerLinks(LAYOUT, {"memory": self.connector}, self.clock, self.events.append)
        self.peers.connect(self.side.peer(self.source_connector.offer()))
        self.throughput = Throughput()
        self.spare = 100
        self.pulls = PrefixPulls(
            self.pool, LAYOUT, self.cache, self.peers, self.throughput, self.clock, self.events.append,
            self.reserve, model_fingerprint=MODEL,
            limits=PullLimits(max_read_bytes=3 * LAYOUT.block_bytes, max_quarantined_share=0.5),
        )  # fmt: skip

    def leave_in_cache(self, tokens: list[int], media: tuple[MediaReference, ...] = ()) -> None:
        sequence = make_sequence(tokens, layout=self.side.layout, media=media)
        ticket = self.side.prefill(sequence)
        sequence.chain.extend(tokens)
        for block, key in zip(ticket.groups[0].blocks, sequence.chain.keys(), strict=False):
            self.side.pool.publish(block, key)
        self.side.source.failed(sequence.request.id, LeaseExpiredError("over"))
        assert self.side.pool.num_in_use == 0

    def reserve(self, num_blocks: int) -> list[int] | None:
        return self.pool.reserve(num_blocks) if num_blocks <= min(self.spare, self.pool.num_free) else None

    def begin(self, tokens: list[int] = TOKENS, hint: PrefixHint = HINT) -> Sequence | None:
        sequence = make_sequence(tokens)
        return sequence if self.pulls.begin(sequence, hint) else None

    def ask_source(self) -> KvTicket | None:
        """What the two services do with the engine's PrefixWanted."""
        wanted = next(event for event in self.events if isinstance(event, PrefixWanted))
        self.side.take_events()
        self.side.source.handle(LookupPrefix(7, wanted.attempt, wanted.unit_hashes))
        (answer,) = self.side.take_events()
        assert isinstance(answer, PrefixTicket) and answer.call == 7
        return answer.ticket

    def found(self, ticket: KvTicket | None) -> None:
        self.pulls.found(PrefixFound(1, ticket))

    def run(self) -> list[Sequence]:
        """Until the pull is over."""
        for _ in range(10):
            if ended := self.pulls.poll():
                return ended
            self.fabric.land_all()
        raise AssertionError("the pull did not end")

    def cached_tokens(self, tokens: list[int] = TOKENS) -> int:
        return len(self.cache.match(make_sequence(tokens))) * LAYOUT.block_tokens

    def check(self) -> None:
        assert self.pool.num_in_use == 0 and self.side.pool.num_in_use == 0
        assert not self.pulls.is_busy and not self.pulls.num_transfers and not self.pulls.num_quarantined
        self.pool.check_integrity()
        self.side.pool.check_integrity()

    def close(self) -> None:
        self.peers.close()
        self.side.close()
        self.memory.close()


@pytest.fixture
def engines() -> Iterator[TwoEngines]:
    engines = TwoEngines()
    yield engines
    engines.close()


def test_what_the_other_engine_has_is_found_here_afterwards(engines: TwoEngines) -> None:
    sequence = engines.begin()
    ticket = engines.ask_source()
    assert ticket is not None and not ticket.is_pinned and ticket.num_tokens == 4 * UNIT
    engines.found(ticket)
    assert engines.run() == [sequence]
    assert engines.cached_tokens() == 4 * UNIT
    here = engines.cache.match(make_sequence(TOKENS))
    there = list(ticket.groups[0].blocks)
    assert torch.equal(engines.memory.block_rows[here], engines.side.memory.block_rows[there])
    assert engines.pulls.num_pulled_blocks == len(here)
    engines.check()


def test_only_missing_blocks_move(engines: TwoEngines) -> None:
    first = engines.begin(TOKENS[: 2 * UNIT + 1])
    assert first is not None
    engines.found(engines.ask_source())
    engines.run()
    assert engines.pulls.num_pulled_blocks == 4
    engines.events.clear()
    engines.begin()
    engines.found(engines.ask_source())
    engines.pulls.poll()
    asked = [block for transfer in engines.fabric.pending for block in transfer.request.remote_blocks]
    assert len(asked) == 4, "two units of two blocks were here already"
    engines.run()
    assert engines.cached_tokens() == 4 * UNIT
    engines.check()


@pytest.mark.parametrize("num_tokens", [0, UNIT - 1, 2 * UNIT, 3 * UNIT])
def test_a_hint_that_promises_nothing_new_is_not_followed(engines: TwoEngines, num_tokens: int) -> None:
    if num_tokens >= UNIT:
        engines.begin(TOKENS)
        engines.found(engines.ask_source())
        engines.run()
        engines.events.clear()
    assert engines.begin(hint=PrefixHint(ADDRESS, num_tokens)) is None
    assert not any(isinstance(event, PrefixWanted) for event in engines.events)


def test_the_last_token_is_always_left_to_compute(engines: TwoEngines) -> None:
    """PROTOCOL A3: logits come from computing it."""
    engines.begin(TOKENS[: 2 * UNIT], PrefixHint(ADDRESS, 2 * UNIT))
    ticket = engines.ask_source()
    assert ticket is not None and ticket.num_tokens == UNIT


def test_another_tenant_finds_nothing(engines: TwoEngines) -> None:
    sequence = make_sequence(TOKENS)
    sequence.chain = PrefixCache(engines.pool, LAYOUT, MODEL).new_chain("another tenant")
    assert engines.pulls.begin(sequence, HINT)
    assert engines.ask_source() is None
    engines.found(None)
    assert engines.run() == [sequence]
    engines.check()


@pytest.mark.parametrize(("content", "num_units"), [(b"c", 4), (b"d", 1)])
def test_kv_of_another_picture_is_not_even_offered(engines: TwoEngines, content: bytes, num_units: int) -> None:
    seen = MediaReference(b"c" * 32, offset=UNIT + 3, num_tokens=6)
    engines.leave_in_cache(TOKENS, (seen,))
    sequence = make_sequence(TOKENS, media=(replace(seen, content_hash=content * 32),))
    assert engines.pulls.begin(sequence, HINT)
    ticket = engines.ask_source()
    assert ticket is not None and ticket.num_tokens == num_units * UNIT
    engines.found(ticket)
    assert engines.run() == [sequence]
    assert len(engines.cache.match(sequence)) * LAYOUT.block_tokens == num_units * UNIT
    engines.check()


def test_a_block_reused_before_the_read_is_not_used(engines: TwoEngines) -> None:
    sequence = engines.begin()
    ticket = engines.ask_source()
    assert ticket is not None
    engines.side.pool.reserve(engines.side.pool.num_free)  # everything is written anew
    engines.found(ticket)
    assert engines.run() == [sequence]
    assert engines.cached_tokens() == 0 and engines.pulls.stale_reads == 1
    (link,) = engines.peers.load()
    assert (link.counts.stale_reads, link.counts.failed_reads) == (1, 0)
    assert engines.pool.num_in_use == 0


def test_a_block_reused_between_data_and_words_is_not_used(engines: TwoEngines) -> None:
    engines.begin()
    ticket = engines.ask_source()
    assert ticket is not None
    engines.found(ticket)
    engines.pulls.poll()
    transfers = list(engines.fabric.pending)
    for transfer in transfers:
        transfer.copy_data()
    engines.side.overwrite(ticket.groups[0].blocks[0])
    for transfer in transfers:
        transfer.read_words()
    engines.pulls.poll()
    assert engines.cached_tokens() == 0, "the chain's first block is the one that was reused"
    engines.pulls.abort(1)
    engines.check()


def test_waiting_ends_when_computing_would_have_been_as_fast(engines: TwoEngines) -> None:
    engines.throughput.record(num_tokens=32, seconds=0.8)
    sequence = engines.begin()
    engines.clock.advance(0.79)
    assert engines.pulls.poll() == []
    engines.clock.advance(0.02)
    assert engines.pulls.poll() == [sequence]
    engines.found(engines.ask_source())  # comes too late
    engines.check()


def test_the_wait_can_be_set_and_be_none_at_all(engines: TwoEngines) -> None:
    def begin(wait_s: float) -> tuple[bool, PrefixPulls]:
        pulls = PrefixPulls(
            engines.pool, LAYOUT, engines.cache, engines.peers, engines.throughput, engines.clock,
            engines.events.append, engines.reserve, model_fingerprint=MODEL, limits=PullLimits(wait_s=wait_s),
        )  # fmt: skip
        return pulls.begin(make_sequence(TOKENS), HINT), pulls

    engines.throughput.record(num_tokens=32, seconds=0.01)
    assert not begin(0.0)[0]
    does_wait, pulls = begin(7.0)
    engines.clock.advance(6.9)
    assert does_wait and not pulls.poll()
    engines.clock.advance(0.2)
    assert len(pulls.poll()) == 1


def test_a_read_that_does_not_end_keeps_its_blocks_to_itself(engines: TwoEngines) -> None:
    engines.begin()
    engines.found(engines.ask_source())
    engines.pulls.poll()
    engines.clock.advance(2.1)
    (ended,) = engines.pulls.poll()
    assert not ended.blocks
    assert engines.pulls.num_quarantined > 0 and engines.pool.num_in_use == engines.pulls.num_quarantined
    engines.fabric.land_all()
    engines.pulls.poll()
    engines.check()


def test_a_request_that_ends_gives_its_pull_up(engines: TwoEngines) -> None:
    engines.begin()
    engines.found(engines.ask_source())
    engines.pulls.poll()
    engines.pulls.abort(1)
    engines.pulls.abort(1)
    engines.fabric.land_all()
    assert engines.pulls.poll() == []
    engines.check()


def test_a_lost_link_costs_only_the_wait(engines: TwoEngines) -> None:
    sequence = engines.begin()
    engines.found(engines.ask_source())
    engines.pulls.poll()
    engines.peers.disconnect(ADDRESS)
    assert engines.pulls.poll() == [sequence]
    assert engines.cached_tokens() == 0
    engines.check()


def test_no_room_to_spare_no_pull(engines: TwoEngines) -> None:
    engines.spare = 3
    sequence = engines.begin()
    engines.found(engines.ask_source())
    assert engines.pulls.poll() == [sequence]
    engines.check()


def test_a_ticket_for_other_tokens_or_another_model_is_not_followed(engines: TwoEngines) -> None:
    engines.begin()
    ticket = engines.ask_source()
    assert ticket is not None
    wrong = [
        replace(ticket, unit_hashes=ticket.unit_hashes[:-1] + b"x"),
        replace(ticket, unit_hashes=ticket.unit_hashes[:-32]),
        replace(ticket, model_fingerprint=b"x" * 32),
        replace(ticket, groups=()),
        replace(ticket, groups=(replace(ticket.groups[0], words=ticket.groups[0].words[1:]),)),
        replace(ticket, layout=replace(ticket.layout, dtype="bfloat16")),
    ]
    for forged in wrong:
        engines.pulls.abort(1)
        sequence = engines.begin()
        engines.found(forged)
        assert engines.pulls.poll() == [sequence]
        assert not engines.fabric.pending
    engines.check()


def test_the_source_serves_its_export_and_nothing_else(engines: TwoEngines) -> None:
    engines.begin()
    ticket = engines.ask_source()
    assert ticket is not None
    source, group = engines.side.source, ticket.groups[0]
    source.check_export(ticket, 0, group.blocks)
    with pytest.raises(TransferError):
        source.check_export(ticket, 0, (group.blocks[-1] + 1,))
    with pytest.raises(TicketRejectedError):
        source.check_export(replace(ticket, groups=(replace(group, blocks=group.blocks[::-1]),)), 0, group.blocks)
    with pytest.raises(TicketRejectedError):
        source.check_export(replace(ticket, is_pinned=True), 0, group.blocks)


def test_an_export_gives_no_lease(engines: TwoEngines) -> None:
    engines.begin()
    ticket = engines.ask_source()
    assert ticket is not None
    engines.side.source.handle(FollowAttach(3, ticket))
    (refused,) = engines.side.take_events()
    assert isinstance(refused, FollowFailed) and refused.error.reason == "LeaseExpiredError"
    assert engines.side.source.num_leases == 0


def test_a_pinned_ticket_cannot_be_passed_off_as_an_export(engines: TwoEngines) -> None:
    """Its lease is what lets its blocks be read, so it must not live on without one."""
    ticket = engines.side.prefill(make_sequence([7] * 16, request_id=9))
    with pytest.raises(TicketRejectedError):
        engines.side.source.check_export(replace(ticket, is_pinned=False), 0, ticket.groups[0].blocks)
    engines.side.source.finished(make_sequence([7] * 16, request_id=9), first_tokens())
    engines.side.source.failed(9, LeaseExpiredError("over"))


@pytest.mark.parametrize("state", [TransferState.FAILED, TransferState.TORN_DOWN])
def test_a_transfer_that_failed_ends_the_pull_and_keeps_what_was_verified(
    engines: TwoEngines, state: TransferState
) -> None:
    sequence = engines.begin()
    engines.found(engines.ask_source())
    engines.pulls.poll()
    first, second, *_ = engines.fabric.pending
    first.land()
    second.end(state, TransferError("the line broke"))
    assert engines.pulls.poll() == [sequence]
    assert engines.peers.failed_reads == 1
    assert engines.cached_tokens() == UNIT, "three blocks were verified, whole units count"
    engines.fabric.land_all()
    engines.pulls.poll()
    engines.check()


def test_a_transfer_that_failed_and_cannot_be_stopped_ends_the_pull_and_counts(engines: TwoEngines) -> None:
    sequence = engines.begin()
    engines.found(engines.ask_source())
    engines.pulls.poll()
    first, *_ = engines.fabric.pending
    first.error = DeadlineError("too late, and it may still land")
    assert engines.pulls.poll() == [sequence]
    assert engines.peers.failed_reads == 1
    assert engines.pulls.num_quarantined > 0
    engines.fabric.land_all()
    engines.pulls.poll()
    assert engines.peers.failed_reads == 1, "it counts once"
    engines.check()


@pytest.mark.parametrize("block_tokens", [2, 8, 16])
def test_a_prefix_in_blocks_of_another_size_is_pulled_as_well(block_tokens: int) -> None:
    """Ours hold 4 tokens, a hit is 8; of blocks of 16 the source has two full ones, of others four units."""
    engines = TwoEngines(source_layout=replace(LAYOUT, block_tokens=block_tokens))
    sequence = engines.begin()
    ticket = engines.ask_source()
    assert ticket is not None and ticket.num_tokens == 4 * UNIT
    engines.found(ticket)
    assert engines.run() == [sequence]
    assert engines.cached_tokens() == 4 * UNIT
    here = engines.memory.tensor[engines.cache.match(make_sequence(TOKENS))]
    there = engines.side.memory.tensor[list(ticket.groups[0].blocks)]
    assert torch.equal(_in_order(here), _in_order(there))
    engines.check()
    engines.close()


def _in_order(blocks: torch.Tensor) -> torch.Tensor:
    """[layers, 2, heads, tokens, dim], as integers: random bytes may be NaN."""
    return blocks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).view(torch.int32)
