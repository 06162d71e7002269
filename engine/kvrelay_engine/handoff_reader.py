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

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
from kvrelay_engine.handoff_incoming import Incoming, PostedRead, check_ticket
from kvrelay_engine.handoff_peers import ActiveLink, PeerLinks
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
from kvrelay_engine.read_room import ReadRoom
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.connectors.base import Connector, Transfer, TransferState
from kvrelay_transfer.connectors.grpc import GrpcConnector
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.quarantine import Quarantine
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
    ) -> None:
        """`connectors` in order of preference. `reserve(sequence, n)` takes n blocks from the pool, which is on this
        kind of `device`, or none."""
        self._pool = pool
        self._layout = layout
        self._model_fingerprint = model_fingerprint
        self._clock = clock
        self._emit = emit
        self._reserve = reserve
        self._limits = limits or ReaderLimits()
        self.peers = PeerLinks(layout, connectors, clock, emit, device=device)
        max_quarantined = int(self._limits.max_quarantined_share * pool.num_blocks)
        self._quarantine = Quarantine(max_quarantined)
        self._room = ReadRoom(self._limits.max_reads, self._limits.max_read_bytes, max_quarantined * layout.block_bytes)
        self._incoming: dict[int, Incoming] = {}
        grpc = connectors.get(GrpcConnector.name)
        self._grpc = grpc if isinstance(grpc, GrpcConnector) else None
        self.handoff_bytes = 0
        self.handoff_s = 0.0
        self.stale_reads = 0

    # ------------------------------------------------------------------------------------------- queries

    @property
    def num_transfers(self) -> int:
        """Reads that are not terminal, quarantined ones included."""
        return sum(len(incoming.reads) for incoming in self._incoming.values()) + self._quarantine.num_transfers

    @property
    def num_quarantined(self) -> int:
        """Blocks that only a read given up still owns."""
        return self._quarantine.num_blocks

    @property
    def is_busy(self) -> bool:
        """Something progresses by itself: poll often. Otherwise poll at least every 100 ms for the budgets."""
        has_failure = any(incoming.failure is not None for incoming in self._incoming.values())
        return self.num_transfers > 0 or self.peers.is_probing or has_failure

    def transfers(self) -> Iterator[Transfer]:
        """That a hand-off waits for."""
        return (read.transfer for incoming in self._incoming.values() for read in incoming.reads)

    def due_s(self) -> float | None:
        """In how much time at most the last reads of a hand-off come, by their link's probe; None where there is none
        such, or its link is not one whose reads take a fraction of a step."""
        last = [incoming.reads for incoming in self._incoming.values() if incoming.is_all_posted and incoming.reads]
        dues = [self._seconds_for(reads[0]) for reads in last if all(read.is_quick for read in reads)]
        return min(dues, default=None)

    def pulled_blocks(self) -> dict[int, int]:
        """Per request id of a hand-off in progress, in blocks of its source; for the engine's Beat."""
        return {request_id: incoming.num_verified for request_id, incoming in self._incoming.items()}

    # ---------------------------------------------------------------------------------- open, handle, abort

    def open(self, sequence: Sequence, ticket: KvTicket) -> None:
        """Begins to wait for the ticket's blocks. `sequence.blocks` is empty and stays so until it has arrived.

        Raises MismatchError when the ticket is not for these tokens, this model or the content of our layout,
        UnsupportedError when its source has several ranks or groups.
        """
        assert not sequence.blocks, "a hand-off begins without blocks"
        check_ticket(ticket, sequence, self._layout, self._model_fingerprint)
        plan = PullPlan(ticket.layout, self._layout, ticket.num_tokens)
        self._incoming[sequence.request.id] = Incoming(sequence, ticket, sequence.chain.keys(), plan)

    def handle(self, command: Command) -> None:
        """Messages for requests or reads that are over are ignored: they crossed with the end."""
        match command:
            case ConnectPeer(peer):
                self.peers.connect(peer)
            case DisconnectPeer(peer_id):
                self.peers.disconnect(peer_id)
            case FetchedPiece(read, first, slot, words):
                self._fetches.deliver(read, first, slot, words)
            case FetchEnded(read, error):
                self._fetches.end(read, error_of(error) if error is not None else None)
            case HandoffReady(request_id) | HandoffComplete(request_id) | HandoffFailed(request_id):
                if request_id in self._incoming:
                    self._hear(self._incoming[request_id], command)
            case _:
                raise InternalError(f"the hand-off reader was given a {type(command).__name__}")

    def abort(self, request_id: int, reason: ReleaseReason = ReleaseReason.CANCELLED) -> None:
        """Gives up the hand-off and all its blocks. After REFUSED another reader may have the ticket. Idempotent."""
        incoming = self._incoming.pop(request_id, None)
        if incoming is not None:
            self._drop(incoming, kept=0)
            self._emit(HandoffRelease(request_id, reason))

    def poll(self) -> list[HandoffArrived | HandoffBroken]:
        """Never blocks. Call once a step, and often while `is_busy`."""
        self.peers.poll()
        self._collect_quarantine()
        ended = [self._advance_or_break(incoming) for incoming in list(self._incoming.values())]
        return [end for end in ended if end is not None]

    def close(self) -> None:
        """Ends every hand-off and link. The pool is of no use afterwards."""
        for request_id in list(self._incoming):
            self.abort(request_id)
        self.peers.close()

    # ----------------------------------------------------------------------------------- one hand-off's way

    def _hear(self, incoming: Incoming, command: HandoffReady | HandoffComplete | HandoffFailed) -> None:
        try:
            match command:
                case HandoffReady(_, num_blocks):
                    incoming.announce(num_blocks)
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
        if incoming.num_ready == 0:
            return None
        if not incoming.blocks and not self._reserve_all(incoming):
            return self._refuse(incoming) if self._has_waited(incoming, self._limits.reserve_budget_s) else None
        self._post_reads(incoming)
        return self._arrive(incoming) if incoming.is_whole else None

    def _collect_reads(self, incoming: Incoming) -> None:
        """Takes in the reads that have ended. Raises after all of them were looked at."""
        error: KvRelayError | None = None
        for read in list(incoming.reads):
            state = read.transfer.poll()
            if not state.is_terminal:
                error = error or read.transfer.error  # it has failed, but is to be quarantined
                continue
            incoming.reads.remove(read)
            try:
                self._take_in(incoming, read, state)
            except KvRelayError as failure:
                error = error or failure
        incoming.note_reading(self._clock.now())
        if error is not None:
            raise error

    def _take_in(self, incoming: Incoming, read: PostedRead, state: TransferState) -> None:
        if state is not TransferState.DONE:
            error = read.transfer.error or TransferError(f"the read from {read.peer_id} ended as {state.value}")
            self._try_again(incoming, read, error)
            return
        before = incoming.num_usable
        try:
            incoming.verify(read)
        except StaleTicketError:
            self.stale_reads += 1
            self.peers.records.note_stale(read.peer_id, read.connector)
            raise
        self.handoff_bytes += read.size_bytes
        for block, key in zip(incoming.blocks[before : incoming.num_usable], incoming.keys[before:], strict=False):
            self._pool.publish(block, key)

    def _try_again(self, incoming: Incoming, read: PostedRead, error: KvRelayError) -> None:
        """A read that failed on its way is posted once more, and again whenever the pair has gone over to another
        connector since; else raises the error."""
        active = self.peers.find(read.peer_id, incoming.ticket.engine_epoch)
        was_tried_so = read.is_second_try and active is not None and active.connector == read.connector
        if active is None or was_tried_so or incoming.failure is not None or not is_worth_another_try(error):
            raise error
        incoming.post_again(read, active.connector, active.read)

    def _reserve_all(self, incoming: Incoming) -> bool:
        """Our own cached blocks first, the rest from the scheduler; all or nothing."""
        reused = self._pool.lookup(incoming.keys)
        self._pool.pin(reused)
        reserved = self._reserve(incoming.sequence, incoming.plan.local_blocks - len(reused))
        if reserved is None:
            self._pool.release(reused)
            return False
        incoming.waiting_since_s = None
        incoming.take(reused + reserved, len(reused))
        return True

    def _post_reads(self, incoming: Incoming) -> None:
        peer_id = incoming.ticket.source_address
        while incoming.num_posted < incoming.num_ready:
            active = self.peers.find(peer_id, incoming.ticket.engine_epoch)
            if active is None:
                if self._has_waited(incoming, self._limits.connect_budget_s):
                    raise TransferError(f"{peer_id} was not connected in time to pull from it", peer_id=peer_id)
                break
            incoming.waiting_since_s = None
            if active.peer.layout != incoming.ticket.layout:
                raise MismatchError("the ticket is of another KV layout than its source has")
            max_bytes = self._next_read_bytes(incoming, active)
            if max_bytes == 0:
                break
            end = incoming.plan.read_end(incoming.num_posted, incoming.num_ready, max_bytes)
            if end == incoming.num_posted:
                break  # our next block is not covered yet
            incoming.post(end, active.peer.peer_id, active.connector, active.read)
        if incoming.reading_since_s is None:
            incoming.note_reading(self._clock.now())

    def _next_read_bytes(self, incoming: Incoming, active: ActiveLink) -> int:
        peer_id = active.peer.peer_id
        given_up_bytes = self._quarantine.num_blocks_of(peer_id, active.connector) * self._layout.block_bytes
        under_way_bytes = self._under_way_bytes(peer_id)
        return self._room.next_read_bytes(active.link.window, len(incoming.reads), under_way_bytes, given_up_bytes)

    def _arrive(self, incoming: Incoming) -> HandoffArrived:
        assert incoming.first_tokens is not None and not incoming.reads
        del self._incoming[incoming.request_id]
        self._give(incoming, len(incoming.blocks), incoming.ticket.num_tokens)
        timing = incoming.timing()
        self.handoff_s += timing.seconds
        self._emit(HandoffRelease(incoming.request_id, ReleaseReason.PULLED))
        return HandoffArrived(incoming.request_id, incoming.first_tokens, timing)

    def _refuse(self, incoming: Incoming) -> HandoffBroken:
        error = OverloadedError("no room for the ticket's KV blocks; offer the ticket to another decode worker")
        return self._break(incoming, error, is_refused=True)

    def _break(self, incoming: Incoming, error: KvRelayError, *, is_refused: bool = False) -> HandoffBroken:
        del self._incoming[incoming.request_id]
        num_blocks = min(incoming.num_usable, incoming.ticket.num_tokens // self._layout.block_tokens)
        num_tokens = num_blocks * self._layout.block_tokens
        self._drop(incoming, kept=num_blocks)
        self._give(incoming, num_blocks, num_tokens)
        self.handoff_s += incoming.reading_s
        reason = ReleaseReason.REFUSED if is_refused else ReleaseReason.FAILED
        self._emit(HandoffRelease(incoming.request_id, reason))
        return HandoffBroken(incoming.request_id, num_blocks, num_tokens, error, is_refused)

    # ------------------------------------------------------------------------------------------ internal

    @property
    def _fetches(self) -> GrpcConnector:
        if self._grpc is None:
            raise InternalError("a fetched piece came, but this engine has no grpc connector")
        return self._grpc

    def _seconds_for(self, read: PostedRead) -> float:
        """As if all that is under way from the peer had just begun."""
        speed = self.peers.records.find(read.peer_id, read.connector).speed
        gb_per_s = 0.0 if speed is None else speed.gb_per_s
        return self._under_way_bytes(read.peer_id) / (1e9 * gb_per_s) if gb_per_s else math.inf

    def _under_way_bytes(self, peer_id: str) -> int:
        """Without what was given up."""
        reads = [read for incoming in self._incoming.values() for read in incoming.reads]
        return sum(read.size_bytes for read in reads if read.peer_id == peer_id)

    def _has_waited(self, incoming: Incoming, budget_s: float) -> bool:
        if incoming.waiting_since_s is None:
            incoming.waiting_since_s = self._clock.now()
        return self._clock.now() - incoming.waiting_since_s >= budget_s

    def _give(self, incoming: Incoming, num_blocks: int, num_tokens: int) -> None:
        """Hands the first blocks to the sequence."""
        sequence = incoming.sequence
        sequence.blocks = incoming.blocks[:num_blocks]
        sequence.num_computed = sequence.num_cached = num_tokens
        sequence.num_published = min(num_blocks, len(incoming.keys))

    def _drop(self, incoming: Incoming, kept: int) -> None:
        """Frees the blocks after the first `kept`, except those that a read may still write to."""
        self._pool.release(incoming.unused_blocks(kept))
        for read in incoming.reads:
            self._quarantine.add(read.peer_id, read.connector, read.transfer, read.blocks)
        self._collect_quarantine()

    def _collect_quarantine(self) -> None:
        self._pool.release(self._quarantine.collect())
        for peer_id, connector in self._quarantine.links_over_cap():
            self.peers.tear_down(peer_id, connector)
            self._pool.release(self._quarantine.collect())
