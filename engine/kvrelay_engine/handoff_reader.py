"""The decode side of hand-offs: pulls the KV of tickets while prefill still computes it, and verifies it.

    open      a request came with a ticket: checked against our own tokens          (PROTOCOL D2)
    Ready     the first one reserves all blocks or none (B6); each one posts reads
    poll      advances reads; data that is here is compared by its words            (A6)
    Complete  the last, partial block and the first tokens                          -> HandoffArrived
    Failed, a lost link, a stale word, no room in time                               -> HandoffBroken

Verified blocks are kept when a hand-off breaks. Destinations of reads that are still under way are
quarantined until the connector says that they ended (A5). Whatever ends the hand-off, the Follow stream is
ended with a reason by HandoffRelease. Knows nothing of steps or sampling; `reserve` is the scheduler's word on room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

from msgspec import Struct

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import error_of
from kvrelay_core.errors import (
    InternalError,
    KvRelayError,
    MismatchError,
    OverloadedError,
    StaleTicketError,
    TransferError,
)
from kvrelay_core.request import FirstToken, HandoffTiming
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.group_pull import GroupPull, PostedRead
from kvrelay_engine.handoff_incoming import Incoming, check_ticket
from kvrelay_engine.handoff_peers import PeerLinks
from kvrelay_engine.kv_group import FIRST_SLIDING_READ, FULL_GROUP, SLIDING_GROUP, KvGroup
from kvrelay_engine.link_health import is_worth_another_try
from kvrelay_engine.messages import (
    Command,
    ConnectPeer,
    DisconnectPeer,
    Event,
    FetchedPiece,
    FetchEnded,
    HandoffComplete,
    HandoffFailed,
    HandoffReady,
    HandoffRelease,
    ReleaseReason,
)
from kvrelay_engine.pull_plan import PullPlan
from kvrelay_engine.reader_group import ReaderGroup
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.block_digest import BlockDigester
from kvrelay_transfer.connectors.base import Connector, Transfer, TransferState
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import KvTicket


@dataclass(slots=True, frozen=True, eq=False)
class HandoffArrived:
    """All KV is here and verified; `sequence.blocks` holds it. Each choice's first token is still to be committed."""

    request_id: int
    first_tokens: tuple[FirstToken, ...]
    timing: HandoffTiming


@dataclass(slots=True, frozen=True, eq=False)
class HandoffBroken:
    """`sequence.blocks` holds the verified blocks, `num_computed` counts their tokens.

    `is_refused`: there was no room and nothing was reserved, so the ticket is as good as it was for another reader.
    Whatever else broke it, also an OverloadedError of the source, is a loss.
    """

    request_id: int
    verified_blocks: int
    verified_tokens: int
    error: KvRelayError
    is_refused: bool = False


class ReaderLimits(Struct, frozen=True):
    reserve_budget_s: float = 2.0  # to wait for room before the ticket is refused
    connect_budget_s: float = 5.0  # to wait for the link to the source
    max_reads: int | None = None  # under way per hand-off; None: what suits the link
    max_read_bytes: int | None = None
    max_quarantined_share: float = 0.25  # of the pool, per link


class HandoffReader:
    def __init__(
        self,
        pool: BlockPool,
        layout: KvLayout,
        connectors: Mapping[str, Connector],
        clock: Clock,
        emit: Callable[[Event], None],
        reserve: Callable[[Sequence, int], list[int] | None],
        *,
        model_fingerprint: bytes,
        limits: ReaderLimits | None = None,
        device: str = "cpu",
        sliding: KvGroup | None = None,
        digester: BlockDigester | None = None,
    ) -> None:
        """`connectors` in order of preference. `reserve(sequence, n)` takes n blocks from the pool, which is on this
        kind of `device`, or none; what is needed of the `sliding` group is then there as well."""
        self._model_fingerprint = model_fingerprint
        self._clock = clock
        self._emit = emit
        self._reserve = reserve
        self._limits = limits or ReaderLimits()
        full = KvGroup(index=FULL_GROUP, pool=pool, layout=layout, connectors=connectors, digester=digester)
        parts = (full,) if sliding is None else (full, sliding)
        links = [PeerLinks(part.layout, part.connectors, clock, emit, device=device) for part in parts]
        self.groups = tuple(map(ReaderGroup, parts, links, repeat(self._limits)))
        self._incoming: dict[int, Incoming] = {}
        self.handoff_bytes = 0
        self.handoff_s = 0.0
        self.stale_reads = 0

    # ------------------------------------------------------------------------------------------- queries

    @property
    def peers(self) -> PeerLinks:
        """To the sources' pools of the full group."""
        return self.groups[FULL_GROUP].peers

    @property
    def num_transfers(self) -> int:
        """Reads that are not terminal, quarantined ones included."""
        num_reads = sum(incoming.num_reads for incoming in self._incoming.values())
        return num_reads + sum(group.quarantine.num_transfers for group in self.groups)

    @property
    def num_quarantined(self) -> int:
        """Blocks that only a read given up still owns, of the full group."""
        return self.groups[FULL_GROUP].quarantine.num_blocks

    @property
    def is_busy(self) -> bool:
        """Something progresses by itself: poll often. Otherwise poll at least every 100 ms for the budgets."""
        has_failure = any(incoming.failure is not None for incoming in self._incoming.values())
        return self.num_transfers > 0 or has_failure or any(group.peers.is_probing for group in self.groups)

    def transfers(self) -> Iterator[Transfer]:
        """That a hand-off waits for."""
        return (read.transfer for incoming in self._incoming.values() for read in incoming.reads())

    def due_s(self) -> float | None:
        """In how much time at most the last reads of a hand-off come, by their link's probe; None where there is none
        such, or its link is not one whose reads take a fraction of a step."""
        last = [list(incoming.reads()) for incoming in self._incoming.values() if incoming.is_all_posted]
        dues = [max(map(self._seconds_for, reads)) for reads in last if reads and all(read.is_quick for read in reads)]
        return min(dues, default=None)

    def pulled_blocks(self) -> dict[int, int]:
        """Per request id of a hand-off in progress, in blocks of its source; for the engine's Beat."""
        return {request_id: incoming.full.num_verified for request_id, incoming in self._incoming.items()}

    # ---------------------------------------------------------------------------------- open, handle, abort

    def open(self, sequence: Sequence, ticket: KvTicket) -> None:
        """Begins to wait for the ticket's blocks. `sequence.blocks` is empty and stays so until it has arrived.

        Raises MismatchError when the ticket is not for these tokens, this model or the content of our layout,
        UnsupportedError when its source has several ranks.
        """
        assert not sequence.blocks, "a hand-off begins without blocks"
        check_ticket(ticket, sequence, [group.layout for group in self.groups], self._model_fingerprint)
        keys = sequence.chain.keys()
        pulls = tuple(
            GroupPull(ticket, blocks, keys, PullPlan(source, group.layout, ticket.num_tokens))
            for group, source, blocks in zip(self.groups, ticket.layouts, ticket.groups, strict=True)
        )
        self._incoming[sequence.request.id] = Incoming(sequence, ticket, pulls)

    def handle(self, command: Command) -> None:
        """Messages for requests or reads that are over are ignored: they crossed with the end."""
        match command:
            case ConnectPeer(peer):
                for group in self.groups:
                    group.connect(peer)
            case DisconnectPeer(peer_id):
                for group in self.groups:
                    group.peers.disconnect(peer_id)
            case FetchedPiece(read, first, slot, words):
                self._group_of(read).deliver(read, first, slot, words)
            case FetchEnded(read, error):
                self._group_of(read).end_fetch(read, error_of(error) if error is not None else None)
            case HandoffReady(request_id) | HandoffComplete(request_id) | HandoffFailed(request_id):
                if request_id in self._incoming:
                    self._hear(self._incoming[request_id], command)
            case _:
                raise InternalError(f"the hand-off reader was given a {type(command).__name__}")

    def abort(self, request_id: int, reason: ReleaseReason = ReleaseReason.CANCELLED) -> None:
        """Gives up the hand-off and all its blocks. After REFUSED another reader may have the ticket. Idempotent."""
        incoming = self._incoming.pop(request_id, None)
        if incoming is not None:
            self._drop(incoming)
            self._emit(HandoffRelease(request_id, reason))

    def poll(self) -> list[HandoffArrived | HandoffBroken]:
        """Never blocks. Call once a step, and often while `is_busy`."""
        for group in self.groups:
            group.peers.poll()
            group.collect_quarantine()
        ended = [self._advance_or_break(incoming) for incoming in list(self._incoming.values())]
        return [end for end in ended if end is not None]

    def close(self) -> None:
        """Ends every hand-off and link. The pool is of no use afterwards."""
        for request_id in list(self._incoming):
            self.abort(request_id)
        for group in self.groups:
            group.peers.close()

    # ----------------------------------------------------------------------------------- one hand-off's way

    def _hear(self, incoming: Incoming, command: HandoffReady | HandoffComplete | HandoffFailed) -> None:
        try:
            match command:
                case HandoffReady(_, num_blocks, digests):
                    incoming.announce(num_blocks, digests)
                case HandoffComplete():
                    incoming.complete(command)
                case HandoffFailed(_, error):
                    incoming.failure = incoming.failure or error_of(error)
        except MismatchError as error:
            incoming.failure = incoming.failure or error

    def _advance_or_break(self, incoming: Incoming) -> HandoffArrived | HandoffBroken | None:
        try:
            return self._advance(incoming)
        except KvRelayError as error:
            return self._break(incoming, error)

    def _advance(self, incoming: Incoming) -> HandoffArrived | HandoffBroken | None:
        self._collect_reads(incoming)
        if incoming.is_whole:  # verified is verified, whatever became of the source since
            return self._arrive(incoming)
        if incoming.failure is not None:
            raise incoming.failure
        if not incoming.is_announced:
            return None
        if not incoming.has_blocks and not self._reserve_all(incoming):
            return self._refuse(incoming) if self._has_waited(incoming, self._limits.reserve_budget_s) else None
        for group, pull in zip(self.groups, incoming.pulls, strict=True):
            self._post_reads(incoming, group, pull)
        if incoming.reading_since_s is None:
            incoming.note_reading(self._clock.now())
        return self._arrive(incoming) if incoming.is_whole else None

    def _collect_reads(self, incoming: Incoming) -> None:
        """Takes in the reads that have ended. Raises after all of them were looked at."""
        error: KvRelayError | None = None
        for group, pull in zip(self.groups, incoming.pulls, strict=True):
            for read in list(pull.reads):
                state = read.transfer.poll()
                if not state.is_terminal:
                    error = error or read.transfer.error  # it has failed, but is to be quarantined
                    continue
                pull.reads.remove(read)
                try:
                    self._take_in(incoming, group, pull, read, state)
                except KvRelayError as failure:
                    error = error or failure
        incoming.note_reading(self._clock.now())
        if error is not None:
            raise error

    def _take_in(
        self, incoming: Incoming, group: ReaderGroup, pull: GroupPull, read: PostedRead, state: TransferState
    ) -> None:
        if state is not TransferState.DONE:
            error = read.transfer.error or TransferError(f"the read from {read.peer_id} ended as {state.value}")
            self._try_again(incoming, group, pull, read, error)
            return
        try:
            whole = group.verify(pull, read)
        except StaleTicketError:
            self.stale_reads += 1
            group.peers.records.note_stale(read.peer_id, read.connector)
            raise
        self.handoff_bytes += read.size_bytes
        for block, key in whole:
            group.pool.publish(block, key)

    def _try_again(
        self, incoming: Incoming, group: ReaderGroup, pull: GroupPull, read: PostedRead, error: KvRelayError
    ) -> None:
        """A read that failed on its way is posted once more, and again whenever the pair has gone over to another
        connector since; else raises the error."""
        active = group.peers.find(read.peer_id, incoming.ticket.engine_epoch)
        was_tried_so = read.is_second_try and active is not None and active.connector == read.connector
        if active is None or was_tried_so or incoming.failure is not None or not is_worth_another_try(error):
            raise error
        pull.post_again(read, active.connector, active.read)

    def _reserve_all(self, incoming: Incoming) -> bool:
        """Our own cached blocks first, the rest from the scheduler; all or nothing."""
        parts = list(zip(self.groups, incoming.pulls, strict=True))
        reused = [group.pool.lookup(pull.keys[pull.plan.local_first :]) for group, pull in parts]
        for (group, _), blocks in zip(parts, reused, strict=True):
            group.pool.pin(blocks)
        reserved = self._reserve(incoming.sequence, incoming.full.plan.local_blocks - len(reused[FULL_GROUP]))
        if reserved is None:
            for (group, _), blocks in zip(parts, reused, strict=True):
                group.pool.release(blocks)
            return False
        incoming.waiting_since_s = None
        incoming.full.take(reused[FULL_GROUP], reserved)
        for (group, pull), blocks in list(zip(parts, reused, strict=True))[1:]:
            missing = pull.plan.local_blocks - pull.plan.local_first - len(blocks)
            pull.take(blocks, group.pool.reserve(missing))
        return True

    def _post_reads(self, incoming: Incoming, group: ReaderGroup, pull: GroupPull) -> None:
        peer_id = incoming.ticket.source_address
        while pull.num_posted < pull.num_ready:
            active = group.peers.find(peer_id, incoming.ticket.engine_epoch)
            if active is None:
                if self._has_waited(incoming, self._limits.connect_budget_s):
                    raise TransferError(f"{peer_id} was not connected in time to pull from it", peer_id=peer_id)
                break
            incoming.waiting_since_s = None
            if active.peer.layout != incoming.ticket.layouts[group.index]:
                raise MismatchError("the ticket is of another KV layout than its source has")
            under_way_bytes = self._under_way_bytes(peer_id, group.index)
            max_bytes = group.next_read_bytes(pull, active, under_way_bytes)
            if max_bytes == 0:
                break
            end = pull.plan.read_end(pull.num_posted, pull.num_ready, max_bytes)
            if end == pull.num_posted:
                break  # our next block is not covered yet
            pull.post(end, active.peer.peer_id, active.connector, active.read)

    def _arrive(self, incoming: Incoming) -> HandoffArrived:
        assert incoming.first_tokens is not None and not incoming.num_reads
        del self._incoming[incoming.request_id]
        self._give(incoming, len(incoming.full.blocks), incoming.ticket.num_tokens)
        for pull in incoming.pulls[1:]:
            incoming.sequence.sliding, incoming.sequence.num_slid = pull.blocks, pull.plan.local_first
        timing = incoming.timing()
        self.handoff_s += timing.seconds
        self._emit(HandoffRelease(incoming.request_id, ReleaseReason.PULLED))
        return HandoffArrived(incoming.request_id, incoming.first_tokens, timing)

    def _refuse(self, incoming: Incoming) -> HandoffBroken:
        error = OverloadedError("no room for the ticket's KV blocks; offer the ticket to another decode worker")
        return self._break(incoming, error, is_refused=True)

    def _break(self, incoming: Incoming, error: KvRelayError, *, is_refused: bool = False) -> HandoffBroken:
        del self._incoming[incoming.request_id]
        num_blocks = incoming.num_kept
        num_tokens = num_blocks * self.groups[FULL_GROUP].layout.block_tokens
        self._drop(incoming, kept=num_blocks)
        self._give(incoming, num_blocks, num_tokens)
        self.handoff_s += incoming.reading_s
        reason = ReleaseReason.REFUSED if is_refused else ReleaseReason.FAILED
        self._emit(HandoffRelease(incoming.request_id, reason))
        return HandoffBroken(incoming.request_id, num_blocks, num_tokens, error, is_refused)

    # ------------------------------------------------------------------------------------------ internal

    def _group_of(self, read: int) -> ReaderGroup:
        """Of a read over the socket."""
        return self.groups[SLIDING_GROUP if read >= FIRST_SLIDING_READ and len(self.groups) > 1 else FULL_GROUP]

    def _seconds_for(self, read: PostedRead) -> float:
        """As if all that is under way from the peer had just begun."""
        size_bytes = sum(self._under_way_bytes(read.peer_id, group.index) for group in self.groups)
        return self.groups[read.read.group].seconds_for(size_bytes, read)

    def _under_way_bytes(self, peer_id: str, group: int) -> int:
        """Without what was given up."""
        reads = [read for incoming in self._incoming.values() for read in incoming.pulls[group].reads]
        return sum(read.size_bytes for read in reads if read.peer_id == peer_id)

    def _has_waited(self, incoming: Incoming, budget_s: float) -> bool:
        if incoming.waiting_since_s is None:
            incoming.waiting_since_s = self._clock.now()
        return self._clock.now() - incoming.waiting_since_s >= budget_s

    def _give(self, incoming: Incoming, num_blocks: int, num_tokens: int) -> None:
        """Hands the first blocks of the full group to the sequence."""
        sequence = incoming.sequence
        sequence.blocks = incoming.full.blocks[:num_blocks]
        sequence.num_computed = sequence.num_cached = num_tokens
        sequence.num_published = min(num_blocks, len(incoming.full.keys))

    def _drop(self, incoming: Incoming, kept: int = 0) -> None:
        """Frees the blocks but for the first `kept` of the full group."""
        for group, pull in zip(self.groups, incoming.pulls, strict=True):
            group.drop(pull, kept if group.index == FULL_GROUP else 0)
