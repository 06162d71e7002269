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

from msgspec import Struct

from kvrelay_core.clock import Clock
from kvrelay_core.errors import KvRelayError, MismatchError, StaleTicketError, TransferError, UnsupportedError
from kvrelay_core.hashing import HASH_BYTES
from kvrelay_core.request import HandoffTiming, PrefixHint
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.group_pull import GroupPull, PostedRead
from kvrelay_engine.handoff_incoming import check_blocks
from kvrelay_engine.handoff_peers import PeerLinks
from kvrelay_engine.kv_group import FULL_GROUP, KvGroup
from kvrelay_engine.message_kinds import Event
from kvrelay_engine.prefix_cache import PrefixCache
from kvrelay_engine.prefix_messages import PrefixFound, PrefixPulled, PrefixWanted
from kvrelay_engine.pull_plan import PullPlan
from kvrelay_engine.reader_group import ReaderGroup
from kvrelay_engine.sequence import Sequence
from kvrelay_engine.throughput import Throughput
from kvrelay_transfer.connectors.base import Transfer, TransferState
from kvrelay_transfer.layout import KvLayout, check_groups
from kvrelay_transfer.ticket import KvTicket

log = logging.getLogger(__name__)

Reserve = Callable[[int], list[int] | None]


class PullLimits(Struct, frozen=True):
    wait_s: float | None = None  # None: as long as computing would take, within the two bounds
    min_wait_s: float = 0.05
    max_wait_s: float = 2.0
    max_reads: int | None = None  # under way per pull; None: what suits the link
    max_read_bytes: int | None = None
    max_quarantined_share: float = 0.1  # of the pool, per link


@dataclass(slots=True, eq=False)
class _Pull:
    sequence: Sequence
    num_units: int  # hash units asked for
    until_s: float
    groups: list[GroupPull] = field(default_factory=list)  # with the ticket, of each KV group
    num_cached: int = 0  # of our blocks of the full group, found here when the ticket came
    num_pulled: int = 0  # of them
    reading_since_s: float | None = None
    is_over: bool = False

    @property
    def num_reads(self) -> int:
        return sum(len(group.reads) for group in self.groups)

    @property
    def is_whole(self) -> bool:
        return bool(self.groups) and all(group.is_whole for group in self.groups)


@dataclass(frozen=True, slots=True)
class SlidingPulls:
    """What pulls need of the sliding group: `reserve(n)` takes n blocks that nobody waits for, or none."""

    group: KvGroup
    peers: PeerLinks
    reserve: Reserve


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
        reserve: Reserve,
        *,
        model_fingerprint: bytes,
        limits: PullLimits | None = None,
        sliding: SlidingPulls | None = None,
    ) -> None:
        """`reserve(n)` takes n blocks that nobody waits for, or none."""
        self._layout = layout
        self._cache = cache
        self._throughput = throughput
        self._clock = clock
        self._emit = emit
        self._model_fingerprint = model_fingerprint
        self._limits = limits or PullLimits()
        parts = [(KvGroup(index=FULL_GROUP, pool=pool, layout=layout), peers, reserve)]
        if sliding is not None:
            parts.append((sliding.group, sliding.peers, sliding.reserve))
        self._groups = [ReaderGroup(group, links, self._limits) for group, links, _ in parts]
        self._reserves = [reserve_of_group for _, _, reserve_of_group in parts]
        self._pulls: dict[int, _Pull] = {}
        self.num_pulled_blocks = 0
        self.stale_reads = 0

    # ------------------------------------------------------------------------------------------- queries

    @property
    def num_transfers(self) -> int:
        num_reads = sum(pull.num_reads for pull in self._pulls.values())
        return num_reads + sum(group.quarantine.num_transfers for group in self._groups)

    @property
    def num_quarantined(self) -> int:
        """Blocks of the full group."""
        return self._groups[FULL_GROUP].quarantine.num_blocks

    def num_held(self, group: int) -> int:
        """Blocks of the group that pulls hold, those of reads that were given up included."""
        num_pulling = sum(pull.groups[group].num_held for pull in self._pulls.values() if pull.groups)
        return num_pulling + self._groups[group].quarantine.num_blocks

    def transfers(self) -> Iterator[Transfer]:
        """That a pull waits for."""
        return (read.transfer for pull in self._pulls.values() for part in pull.groups for read in part.reads)

    @property
    def is_busy(self) -> bool:
        """Something is under way, or a wait has to be ended: poll often."""
        return bool(self._pulls) or any(group.quarantine.num_transfers for group in self._groups)

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
        if pull is None or pull.groups:
            return
        if message.ticket is None:
            pull.is_over = True
            return
        try:
            groups = self._plan(message.ticket, pull)
        except (MismatchError, UnsupportedError) as error:
            log.warning("a prefix cannot be pulled from %s: %s", message.ticket.source_address, error.message)
            pull.is_over = True
            return
        self._hold_blocks(pull, groups)

    def poll(self) -> list[Sequence]:
        """Never blocks. Returns those whose pull is over, whatever came of it; they hold nothing."""
        for group in self._groups:
            group.collect_quarantine()
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
        for group, part in zip(self._groups, pull.groups, strict=False):
            group.drop(part, kept=0)
        self._emit(PrefixPulled(request_id, self._timing(pull)))

    # ------------------------------------------------------------------------------------------ internal

    def _wait_s(self, num_tokens: int) -> float:
        limits = self._limits
        if limits.wait_s is not None:
            return limits.wait_s
        compute_s = self._throughput.seconds_for(num_tokens) or limits.max_wait_s
        return min(max(compute_s, limits.min_wait_s), limits.max_wait_s)

    def _plan(self, ticket: KvTicket, pull: _Pull) -> list[GroupPull]:
        """What of the ticket fills whole hits of ours.

        Raises MismatchError unless it is for a prefix of what was asked for, UnsupportedError for a source of several
        ranks, and for one whose last tokens would not be a hit here but have what the sliding group needs.
        """
        check_groups([group.layout for group in self._groups], ticket.layouts)
        if ticket.model_fingerprint != self._model_fingerprint:
            raise MismatchError("the ticket is for another model or other weights")
        asked = b"".join(pull.sequence.chain.unit_hashes[: pull.num_units])
        num_units = len(ticket.unit_hashes) // HASH_BYTES
        is_ours = (
            asked.startswith(ticket.unit_hashes) and ticket.num_tokens == num_units * self._layout.hash_unit_tokens
        )
        if not is_ours:
            raise MismatchError("the ticket is not for the tokens that were asked for")
        check_blocks(ticket)
        num_tokens = ticket.num_tokens - ticket.num_tokens % self._layout.hit_tokens
        if num_tokens < ticket.num_tokens and len(self._groups) > 1:
            raise UnsupportedError(f"{ticket.num_tokens} tokens of a model with windows do not fill blocks of ours")
        keys = pull.sequence.chain.keys()
        plans = [
            PullPlan(source, group.layout, num_tokens)
            for group, source in zip(self._groups, ticket.layouts, strict=True)
        ]
        return [
            GroupPull(ticket, blocks, keys[: plan.local_blocks], plan)
            for blocks, plan in zip(ticket.groups, plans, strict=True)
        ]

    def _hold_blocks(self, pull: _Pull, parts: list[GroupPull]) -> None:
        """Our cached blocks first, so that room for the missing ones is not made at their cost; all or nothing."""
        pull.groups = parts
        for group, part, reserve in zip(self._groups, parts, self._reserves, strict=True):
            keys = part.keys[part.plan.local_first :]
            cached = group.pool.lookup(keys)
            group.pool.pin(cached)
            part.take(cached, [])  # they count as held from now on
            missing = reserve(len(keys) - len(cached))
            pull.is_over |= missing is None
            part.take(cached, missing or [])
            part.complete()
        pull.num_cached = parts[FULL_GROUP].num_reused
        pull.is_over |= pull.is_whole

    def _advance(self, pull: _Pull) -> None:
        try:
            for group, part in zip(self._groups, pull.groups, strict=False):
                self._collect_reads(pull, group, part)
                if not pull.is_over:
                    self._post_reads(pull, group, part)
            pull.is_over |= pull.is_whole
        except KvRelayError as error:
            log.info("a prefix pull ended early: %s", error.message)
            self.stale_reads += isinstance(error, StaleTicketError)
            pull.is_over = True
        if self._clock.now() >= pull.until_s:
            pull.is_over = True

    def _collect_reads(self, pull: _Pull, group: ReaderGroup, part: GroupPull) -> None:
        for read in list(part.reads):
            state = read.transfer.poll()
            if not state.is_terminal:
                if read.transfer.error is not None:  # it has failed, but is to be quarantined
                    raise read.transfer.error
                continue
            part.reads.remove(read)
            if state is not TransferState.DONE:
                raise read.transfer.error or TransferError(f"the read ended as {state.value}")
            self._take_in(pull, group, part, read)

    def _take_in(self, pull: _Pull, group: ReaderGroup, part: GroupPull, read: PostedRead) -> None:
        try:
            whole = group.verify(part, read)
        except StaleTicketError:
            group.peers.records.note_stale(read.peer_id, read.connector)
            raise
        for block, key in whole:
            group.pool.publish(block, key)
        if group.index == FULL_GROUP:
            pull.num_pulled += len(whole)
            self.num_pulled_blocks += len(whole)

    def _post_reads(self, pull: _Pull, group: ReaderGroup, part: GroupPull) -> None:
        while part.num_posted < part.num_ready:
            active = group.peers.find(part.ticket.source_address, part.ticket.engine_epoch)
            if active is None:
                return  # the link comes up, or the time runs out
            under_way_bytes = self._under_way_bytes(part.ticket.source_address, group.index)
            max_bytes = group.next_read_bytes(part, active, under_way_bytes)
            if max_bytes == 0:
                return
            end = part.plan.read_end(part.num_posted, part.num_ready, max_bytes)
            part.post(end, active.peer.peer_id, active.connector, active.read)
            if pull.reading_since_s is None:
                pull.reading_since_s = self._clock.now()

    def _under_way_bytes(self, peer_id: str, group: int) -> int:
        parts = [pull.groups[group] for pull in self._pulls.values() if pull.groups]
        return sum(read.size_bytes for part in parts for read in part.reads if read.peer_id == peer_id)

    def _timing(self, pull: _Pull) -> HandoffTiming:
        reading_s = 0.0 if pull.reading_since_s is None else self._clock.now() - pull.reading_since_s
        pulled_bytes = sum(part.pulled_bytes for part in pull.groups)
        connector = next((part.connector for part in pull.groups if part.connector), "")
        return HandoffTiming(pulled_bytes, reading_s, pull.num_pulled, pull.num_cached, connector)
