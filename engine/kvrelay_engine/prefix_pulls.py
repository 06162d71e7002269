"""KV of an input's beginning, pulled from a worker that has it before the rest is computed here.

    begin    a request came with a hint: what we lack is asked for                     -> PrefixWanted
    found    an unpinned ticket: the blocks that are missing here are read
    poll     what is verified enters the prefix cache; then the request is scheduled like any other

It is the next turn of a conversation coming back from decode to prefill, or a request that moves from one decode
worker to another. Nothing here is ever an error of the request: a source that does not know, is slow, gone or stale
costs the wait, and the wait is bounded by what computing the tokens would take. Destinations of reads that are still
under way when a pull ends are quarantined (PROTOCOL A5). Knows nothing of steps, streams or routers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from msgspec import Struct

from kvrelay_core.clock import Clock
from kvrelay_core.errors import KvRelayError, MismatchError, StaleTicketError, TransferError, UnsupportedError
from kvrelay_core.hashing import HASH_BYTES
from kvrelay_core.request import HandoffTiming, PrefixHint
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.handoff_peers import ActiveLink, PeerLinks
from kvrelay_engine.message_kinds import Event
from kvrelay_engine.prefix_cache import PrefixCache
from kvrelay_engine.prefix_messages import PrefixFound, PrefixPulled, PrefixWanted
from kvrelay_engine.pull_plan import PullPlan
from kvrelay_engine.read_room import ReadRoom
from kvrelay_engine.sequence import Sequence
from kvrelay_engine.throughput import Throughput
from kvrelay_transfer.connectors.base import BlockRead, Transfer, TransferState, as_blocks
from kvrelay_transfer.fence import WordArray, agree
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.quarantine import Quarantine
from kvrelay_transfer.slice_plan import BlockPairs
from kvrelay_transfer.ticket import KvTicket

log = logging.getLogger(__name__)


class PullLimits(Struct, frozen=True):
    wait_s: float | None = None  # None: as long as computing would take, within the two bounds
    min_wait_s: float = 0.05
    max_wait_s: float = 2.0
    max_reads: int | None = None  # under way per pull; None: what suits the link
    max_read_bytes: int | None = None
    max_quarantined_share: float = 0.1  # of the pool, per link


@dataclass(slots=True, eq=False)
class _PostedRead:
    positions: tuple[int, ...]  # of our blocks that it fills
    expected_words: WordArray
    size_bytes: int
    transfer: Transfer
    connector: str


@dataclass(slots=True, eq=False)
class _Pull:
    sequence: Sequence
    num_units: int  # hash units asked for
    until_s: float
    ticket: KvTicket | None = None
    plan: PullPlan | None = None  # with the ticket
    keys: list[bytes] = field(default_factory=list)  # of our blocks
    num_cached: int = 0  # of our blocks, found here when the ticket came
    blocks: list[int] = field(default_factory=list)  # ours, held: cached ones, then destinations
    next_read: int = 0  # of the ticket's blocks
    reads: list[_PostedRead] = field(default_factory=list)
    num_pulled: int = 0
    pulled_bytes: int = 0
    reading_since_s: float | None = None
    connector: str = ""
    is_over: bool = False


class PrefixPulls:
    def __init__(
        self,
        pool: BlockPool,
        layout: KvLayout,
        cache: PrefixCache,
        peers: PeerLinks,
        throughput: Throughput,
        clock: Clock,
        emit: Callable[[Event], None],
        reserve: Callable[[int], list[int] | None],
        *,
        model_fingerprint: bytes,
        limits: PullLimits | None = None,
    ) -> None:
        """`reserve(n)` takes n blocks that nobody waits for, or none."""
        self._pool = pool
        self._layout = layout
        self._cache = cache
        self._peers = peers
        self._throughput = throughput
        self._clock = clock
        self._emit = emit
        self._reserve = reserve
        self._model_fingerprint = model_fingerprint
        self._limits = limits or PullLimits()
        max_quarantined = int(self._limits.max_quarantined_share * pool.num_blocks)
        self._quarantine = Quarantine(max_quarantined)
        self._room = ReadRoom(self._limits.max_reads, self._limits.max_read_bytes, max_quarantined * layout.block_bytes)
        self._pulls: dict[int, _Pull] = {}
        self.num_pulled_blocks = 0
        self.stale_reads = 0

    # ------------------------------------------------------------------------------------------- queries

    @property
    def num_transfers(self) -> int:
        return sum(len(pull.reads) for pull in self._pulls.values()) + self._quarantine.num_transfers

    @property
    def num_quarantined(self) -> int:
        return self._quarantine.num_blocks

    def transfers(self) -> Iterator[Transfer]:
        """That a pull waits for."""
        return (read.transfer for pull in self._pulls.values() for read in pull.reads)

    @property
    def is_busy(self) -> bool:
        """Something is under way, or a wait has to be ended: poll often."""
        return bool(self._pulls) or self._quarantine.num_transfers > 0

    # --------------------------------------------------------------------------------------- begin to end

    def begin(self, sequence: Sequence, hint: PrefixHint) -> bool:
        """Whether the request waits for a pull. False: nothing is to be gained, schedule it now."""
        unit = self._layout.hit_tokens
        num_cached = len(self._cache.match(sequence)) * self._layout.block_tokens
        num_wanted = min(hint.num_tokens, len(sequence.tokens) - 1) // unit * unit
        if num_wanted <= num_cached or self._limits.wait_s == 0:
            return False
        until_s = self._clock.now() + self._wait_s(num_wanted - num_cached)
        num_units = num_wanted // self._layout.hash_unit_tokens
        request = sequence.request
        self._pulls[request.id] = _Pull(sequence, num_units, until_s)
        unit_hashes = b"".join(sequence.chain.unit_hashes[:num_units])
        self._emit(PrefixWanted(request.id, request.attempt, hint.source_address, unit_hashes))
        return True

    def found(self, message: PrefixFound) -> None:
        """The source's answer; ignored when the pull is over."""
        pull = self._pulls.get(message.id)
        if pull is None or pull.ticket is not None:
            return
        if message.ticket is None:
            pull.is_over = True
            return
        try:
            pull.plan = self._plan(message.ticket, pull)
        except (MismatchError, UnsupportedError) as error:
            log.warning("a prefix cannot be pulled from %s: %s", message.ticket.source_address, error.message)
            pull.is_over = True
            return
        self._hold_blocks(pull, message.ticket, pull.plan)

    def poll(self) -> list[Sequence]:
        """Never blocks. Returns those whose pull is over, whatever came of it; they hold nothing."""
        self._collect_quarantine()
        ended = []
        for request_id, pull in list(self._pulls.items()):
            self._advance(pull)
            if pull.is_over:
                self.abort(request_id)
                ended.append(pull.sequence)
        return ended

    def abort(self, request_id: int) -> None:
        """Gives the pull up; what was verified stays in the prefix cache. Idempotent."""
        pull = self._pulls.pop(request_id, None)
        if pull is None:
            return
        posted = {position for read in pull.reads for position in read.positions}
        self._pool.release(block for position, block in enumerate(pull.blocks) if position not in posted)
        for read in pull.reads:
            assert pull.ticket is not None
            blocks = [pull.blocks[position] for position in read.positions]
            self._quarantine.add(pull.ticket.source_address, read.connector, read.transfer, blocks)
        self._collect_quarantine()
        self._emit(PrefixPulled(request_id, self._timing(pull)))

    # ------------------------------------------------------------------------------------------ internal

    def _wait_s(self, num_tokens: int) -> float:
        limits = self._limits
        if limits.wait_s is not None:
            return limits.wait_s
        compute_s = self._throughput.seconds_for(num_tokens) or limits.max_wait_s
        return min(max(compute_s, limits.min_wait_s), limits.max_wait_s)

    def _plan(self, ticket: KvTicket, pull: _Pull) -> PullPlan:
        """What of the ticket fills whole hits of ours.

        Raises MismatchError unless it is for a prefix of what was asked for, UnsupportedError for a source of several
        ranks.
        """
        self._layout.check_compatible(ticket.layout)
        if ticket.model_fingerprint != self._model_fingerprint:
            raise MismatchError("the ticket is for another model or other weights")
        asked = b"".join(pull.sequence.chain.unit_hashes[: pull.num_units])
        num_units = len(ticket.unit_hashes) // HASH_BYTES
        is_ours = (
            asked.startswith(ticket.unit_hashes) and ticket.num_tokens == num_units * self._layout.hash_unit_tokens
        )
        group = ticket.groups[0] if len(ticket.groups) == 1 else None
        num_blocks = ticket.layout.blocks_for(ticket.num_tokens)
        if not is_ours or group is None or not len(group.blocks) == len(group.words) == num_blocks:
            raise MismatchError("the ticket is not for the tokens that were asked for")
        return PullPlan(ticket.layout, self._layout, ticket.num_tokens - ticket.num_tokens % self._layout.hit_tokens)

    def _hold_blocks(self, pull: _Pull, ticket: KvTicket, plan: PullPlan) -> None:
        """Our cached blocks first, so that room for the missing ones is not made at their cost."""
        keys = pull.sequence.chain.keys()[: plan.local_blocks]
        cached = self._pool.lookup(keys)
        self._pool.pin(cached)
        missing = self._reserve(len(keys) - len(cached)) if len(cached) < len(keys) else None
        pull.ticket, pull.keys, pull.blocks = ticket, keys, cached + (missing or [])
        pull.num_cached = len(cached)
        pull.next_read = plan.source_blocks_in(len(cached))
        pull.is_over = not missing

    def _advance(self, pull: _Pull) -> None:
        try:
            self._collect_reads(pull)
            if pull.ticket is not None and pull.plan is not None and not pull.is_over:
                self._post_reads(pull, pull.ticket, pull.plan)
                pull.is_over = pull.next_read == pull.plan.source_blocks and not pull.reads
        except KvRelayError as error:
            log.info("a prefix pull ended early: %s", error.message)
            self.stale_reads += isinstance(error, StaleTicketError)
            pull.is_over = True
        if self._clock.now() >= pull.until_s:
            pull.is_over = True

    def _collect_reads(self, pull: _Pull) -> None:
        for read in list(pull.reads):
            state = read.transfer.poll()
            if not state.is_terminal:
                if read.transfer.error is not None:  # it has failed, but is to be quarantined
                    raise read.transfer.error
                continue
            pull.reads.remove(read)
            if state is not TransferState.DONE:
                raise read.transfer.error or TransferError(f"the read ended as {state.value}")
            self._take_in(pull, read)

    def _take_in(self, pull: _Pull, read: _PostedRead) -> None:
        """Compares the words that followed the data with the ticket's (PROTOCOL A6): all or nothing."""
        if not agree(read.transfer.words, read.expected_words):
            if pull.ticket is not None:
                self._peers.records.note_stale(pull.ticket.source_address, read.connector)
            raise StaleTicketError("blocks of the prefix were reused before they were read; nothing of it is used")
        for position in read.positions:
            self._pool.publish(pull.blocks[position], pull.keys[position])
        pull.num_pulled += len(read.positions)
        pull.pulled_bytes += read.size_bytes
        self.num_pulled_blocks += len(read.positions)

    def _post_reads(self, pull: _Pull, ticket: KvTicket, plan: PullPlan) -> None:
        while pull.next_read < plan.source_blocks:
            active = self._peers.find(ticket.source_address, ticket.engine_epoch)
            if active is None:
                return  # the link comes up, or the time runs out
            max_bytes = self._next_read_bytes(pull, ticket.source_address, active)
            if max_bytes == 0:
                return
            first = pull.next_read
            end = pull.next_read = plan.read_end(first, plan.source_blocks, max_bytes)
            pull.reads.append(self._post(pull, ticket, plan, plan.pair(first, end, pull.num_cached), active))
            pull.connector = active.connector
            if pull.reading_since_s is None:
                pull.reading_since_s = self._clock.now()

    def _next_read_bytes(self, pull: _Pull, peer_id: str, active: ActiveLink) -> int:
        pulls = [other for other in self._pulls.values() if other.ticket and other.ticket.source_address == peer_id]
        under_way_bytes = sum(read.size_bytes for other in pulls for read in other.reads)
        given_up_bytes = self._quarantine.num_blocks_of(peer_id, active.connector) * self._layout.block_bytes
        return self._room.next_read_bytes(active.link.window, len(pull.reads), under_way_bytes, given_up_bytes)

    def _post(
        self, pull: _Pull, ticket: KvTicket, plan: PullPlan, pairs: BlockPairs, active: ActiveLink
    ) -> _PostedRead:
        group = ticket.groups[0]
        remote, words = as_blocks(group.blocks)[pairs.remote], np.array(group.words, np.uint64)[pairs.remote]
        local = as_blocks(pull.blocks)[pairs.local]
        transfer = active.read(BlockRead(ticket, group.group, remote, local, pairs.slices))
        return _PostedRead(
            tuple(dict.fromkeys(pairs.local.tolist())), words, plan.size_bytes(pairs), transfer, active.connector
        )

    def _timing(self, pull: _Pull) -> HandoffTiming:
        reading_s = 0.0 if pull.reading_since_s is None else self._clock.now() - pull.reading_since_s
        return HandoffTiming(pull.pulled_bytes, reading_s, pull.num_pulled, pull.num_cached, pull.connector)

    def _collect_quarantine(self) -> None:
        self._pool.release(self._quarantine.collect())
        for peer_id, connector in self._quarantine.links_over_cap():
            self._peers.tear_down(peer_id, connector)
            self._pool.release(self._quarantine.collect())
