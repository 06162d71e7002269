"""Prefill's side of embeddings: pulls the items of requests into a pool of their own, and keeps them for the next ones.

    open     a request came: its tickets are checked against its placeholders
    want     from which token on embeddings are needed: what the prefix cache covers is not pulled
    poll     first come, first served: room for all that a request lacks, or it waits; then reads, then words (A6),
             then the encoder's word that the ticket is its own (D1)
    is_here  whether a chunk may cover an item
    close    the request is over: items stay in the cache, tickets go back to their encoders

A request has room for all its items before it gets any KV blocks (`has_room`), so two requests never wait for each
other. An item that several requests wait for is pulled once. Destinations of reads that are given up are quarantined
(A5). A lost item is an EmbeddingLostError that names it, so that the router has it encoded again. Knows no steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from msgspec import Struct
from torch import Tensor

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import error_of
from kvrelay_core.errors import (
    EmbeddingLostError,
    InternalError,
    KvRelayError,
    OverloadedError,
    PoolExhaustedError,
    StaleTicketError,
    TransferError,
)
from kvrelay_core.request import MediaReference
from kvrelay_engine.embedding_messages import EmbeddingCheck, EmbeddingChecked, EmbeddingRelease, EmbeddingSourceFailed
from kvrelay_engine.embeddings.cache import CachedItem, EmbeddingCache
from kvrelay_engine.embeddings.pull import EmbeddingPull
from kvrelay_engine.embeddings.tickets import check_tickets
from kvrelay_engine.handoff_peers import PeerLinks
from kvrelay_engine.media_chunks import end_of
from kvrelay_engine.messages import Command, ConnectPeer, DisconnectPeer, Event, FetchedPiece, FetchEnded
from kvrelay_transfer.connectors.base import Connector
from kvrelay_transfer.connectors.grpc import GrpcConnector
from kvrelay_transfer.quarantine import Quarantine
from kvrelay_transfer.ticket import EmbeddingTicket


@dataclass(slots=True, frozen=True, eq=False)
class EmbeddingsLost:
    """A request cannot have the embeddings that it needs. It is to be ended."""

    request_id: int
    error: KvRelayError


class EmbeddingLimits(Struct, frozen=True):
    room_budget_s: float = 10.0  # to wait for room in the pool
    connect_budget_s: float = 5.0  # to wait for the link to the encoder
    max_reads: int = 4  # under way per item
    max_read_bytes: int = 32 << 20
    max_quarantined_share: float = 0.25  # of the pool, per link


@dataclass(slots=True, eq=False)
class _Wanted:
    """What one request needs."""

    request_id: int
    media: tuple[MediaReference, ...]
    tickets: dict[bytes, EmbeddingTicket]  # by content hash
    pinned: list[EmbeddingTicket]  # not given back yet
    from_token: int
    since_s: float  # when it began to wait for room
    has_room: bool = False
    held: dict[bytes, CachedItem] = field(default_factory=dict)  # here, and ours until we drop them

    def needed(self, from_token: int) -> set[bytes]:
        return {reference.content_hash for reference in self.media if end_of(reference) > from_token}


class EmbeddingReader:
    def __init__(
        self,
        cache: EmbeddingCache,
        connectors: Mapping[str, Connector],
        clock: Clock,
        emit: Callable[[Event], None],
        limits: EmbeddingLimits | None = None,
    ) -> None:
        """`connectors` of the cache's pool, in order of preference."""
        self.cache = cache
        self._clock = clock
        self._emit = emit
        self._limits = limits or EmbeddingLimits()
        self.peers = PeerLinks(cache.layout, connectors, clock, emit)
        grpc = connectors.get(GrpcConnector.name)
        self._grpc = grpc if isinstance(grpc, GrpcConnector) else None
        self._quarantine = Quarantine(int(self._limits.max_quarantined_share * cache.num_blocks))
        self._wanted: dict[int, _Wanted] = {}  # in order of arrival
        self._pulls: dict[bytes, EmbeddingPull] = {}  # by content hash
        self._lost: dict[int, KvRelayError] = {}  # by request
        self.num_pulled = 0
        self.pulled_bytes = 0
        self.stale_reads = 0

    # ------------------------------------------------------------------------------------------- queries

    @property
    def num_transfers(self) -> int:
        """Reads that are not terminal, quarantined ones included."""
        return sum(len(pull.reads) for pull in self._pulls.values()) + self._quarantine.num_transfers

    @property
    def num_requests(self) -> int:
        return len(self._wanted)

    @property
    def is_busy(self) -> bool:
        """Something progresses by itself: poll often."""
        return bool(self._pulls or self._lost) or self._quarantine.num_transfers > 0 or self.peers.is_probing

    def has_room(self, request_id: int, from_token: int) -> bool:
        """Whether the request may be given KV blocks when its tokens before `from_token` need no computing.

        Where more than was said before is to be computed, it has to wait for room for all of it anew.
        """
        wanted = self._wanted[request_id]
        if from_token < wanted.from_token and wanted.needed(from_token) - wanted.needed(wanted.from_token):
            self._leave_room(wanted)
            wanted.since_s = self._clock.now()
        wanted.from_token = min(wanted.from_token, from_token)
        return wanted.has_room or not wanted.needed(from_token)

    def is_here(self, request_id: int, reference: MediaReference) -> bool:
        return reference.content_hash in self._wanted[request_id].held

    def rows(self, request_id: int, reference: MediaReference, first: int, count: int) -> Tensor:
        """Rows of placeholders [first, first + count) of the run: [count, hidden], on the host."""
        item = self._wanted[request_id].held[reference.content_hash]
        return self.cache.rows(item, reference.first_row + first, count)

    # ------------------------------------------------------------------------------ open, handle, poll, close

    def open(
        self, request_id: int, media: Sequence[MediaReference], tickets: Sequence[EmbeddingTicket], from_token: int
    ) -> None:
        """Begins to bring what the tokens from `from_token` on need.

        Raises MismatchError when the tickets are not for these placeholders and this pool, PoolExhaustedError when the
        pool can never hold them.
        """
        by_hash = check_tickets(media, tickets, self.cache.layout)
        num_blocks = sum(self.cache.layout.blocks_for(ticket.num_tokens) for ticket in by_hash.values())
        if num_blocks > self.cache.num_blocks:
            raise PoolExhaustedError(
                f"the request's images need {num_blocks} blocks of embeddings, the whole pool has "
                f"{self.cache.num_blocks}; send fewer, or start prefill with more --embedding-mib",
                needed=num_blocks,
            )
        assert request_id not in self._wanted
        now_s = self._clock.now()
        self._wanted[request_id] = _Wanted(request_id, tuple(media), by_hash, list(tickets), from_token, now_s)
        self._give_room()

    def handle(self, command: Command) -> None:
        """Messages for requests or reads that are over are ignored: they crossed with the end."""
        match command:
            case ConnectPeer(peer):
                self.peers.connect(peer)
            case DisconnectPeer(peer_id):
                self.peers.disconnect(peer_id)
            case FetchedPiece(read, first, slot, words) if self._grpc is not None:
                self._grpc.deliver(read, first, slot, words)
            case FetchEnded(read, error) if self._grpc is not None:
                self._grpc.end(read, error_of(error) if error is not None else None)
            case EmbeddingSourceFailed(_, source_address, error):
                self._lose_source(source_address, error_of(error))
            case EmbeddingChecked(ticket_id, error):
                self._note_check(ticket_id, error_of(error) if error is not None else None)
            case _:
                raise InternalError(f"the reader of embeddings was given a {type(command).__name__}")

    def poll(self) -> list[EmbeddingsLost]:
        """Never blocks."""
        self.peers.poll()
        self._collect_quarantine()
        for content_hash, pull in list(self._pulls.items()):
            try:
                self._advance(content_hash, pull)
            except KvRelayError as error:
                self._lose(content_hash, error)
        self._give_room()
        lost, self._lost = self._lost, {}
        return [EmbeddingsLost(request_id, error) for request_id, error in lost.items()]

    def close_request(self, request_id: int) -> None:
        """The request needs nothing any more. Idempotent."""
        wanted = self._wanted.pop(request_id, None)
        if wanted is None:
            return
        self._lost.pop(request_id, None)
        self._leave_room(wanted)
        self.release(wanted.pinned)

    def close(self) -> None:
        """Ends every pull and link."""
        for request_id in list(self._wanted):
            self.close_request(request_id)
        self.peers.close()
        self._collect_quarantine()

    # ----------------------------------------------------------------------------------------------- room

    def _give_room(self) -> None:
        """Strictly in order: whoever does not fit holds up those behind, so that nobody starves."""
        for wanted in self._wanted.values():
            if wanted.has_room or not wanted.needed(wanted.from_token):
                continue
            if not self._take_room(wanted):
                if self._clock.now() - wanted.since_s >= self._limits.room_budget_s:
                    error = OverloadedError("no room for the request's embeddings; offer it to another prefill worker")
                    self._lost[wanted.request_id] = error
                return

    def _take_room(self, wanted: _Wanted) -> bool:
        """Room for all items that the request lacks, or none."""
        needed = wanted.needed(wanted.from_token)
        found = {one: item for one in needed if (item := self.cache.find(one)) is not None}
        for item in found.values():
            self.cache.hold(item)
        missing = [one for one in needed if one not in found and one not in self._pulls]
        sizes = [self.cache.layout.blocks_for(wanted.tickets[one].num_tokens) for one in missing]
        if sum(sizes) > self.cache.pool.num_free:
            for item in found.values():
                self.cache.drop(item)
            return False
        for content_hash in missing:
            self._begin(wanted.tickets[content_hash])
        for content_hash in needed - found.keys():
            self._pulls[content_hash].waiters.add(wanted.request_id)
        wanted.has_room = True
        for content_hash, item in found.items():
            self._arrive(wanted, content_hash, item)
        return True

    def _begin(self, ticket: EmbeddingTicket) -> None:
        blocks = self.cache.reserve(ticket.num_tokens)
        assert blocks is not None, "there was room a moment ago"
        self._pulls[ticket.content_hash] = EmbeddingPull(ticket, blocks, self._clock.now())

    def _leave_room(self, wanted: _Wanted) -> None:
        for item in wanted.held.values():
            self.cache.drop(item)
        wanted.held.clear()
        wanted.has_room = False
        for content_hash, pull in list(self._pulls.items()):
            pull.waiters.discard(wanted.request_id)
            if not pull.waiters:
                self._give_up(content_hash)

    # ---------------------------------------------------------------------------------------------- pulls

    def _advance(self, content_hash: bytes, pull: EmbeddingPull) -> None:
        source = pull.ticket.source_address
        pull.collect(partial(self.peers.note_read, source))
        if not pull.is_whole:
            active = self.peers.find(source, pull.ticket.engine_epoch)
            if active is not None:
                layout = self.cache.layout
                pull.post(active, self._limits.max_reads, max(1, self._limits.max_read_bytes // layout.block_bytes))
            elif not pull.has_begun and self._clock.now() - pull.waiting_since_s >= self._limits.connect_budget_s:
                raise TransferError(f"{source} was not connected in time to pull from it")
            elif pull.has_begun and not pull.reads:
                raise TransferError(f"the link to {source} is gone")
        elif not pull.is_checking:
            self._check(pull)

    def _check(self, pull: EmbeddingPull) -> None:
        """Who reads the encoder's memory by itself has shown the ticket to nobody yet: it may have been altered."""
        pull.is_checking = True
        self._emit(EmbeddingCheck(pull.ticket))

    def _note_check(self, ticket_id: str, error: KvRelayError | None) -> None:
        """Of a pull that was given up meanwhile there is nothing to say."""
        for content_hash, pull in list(self._pulls.items()):
            if pull.is_checking and pull.ticket.ticket_id == ticket_id:
                if error is None:
                    self._forget_ticket(ticket_id)
                    self._finish(content_hash, pull)
                else:
                    self._lose(content_hash, error)

    def _forget_ticket(self, ticket_id: str) -> None:
        """It was given back; one that could not be is given back again when its request ends."""
        for wanted in self._wanted.values():
            wanted.pinned = [ticket for ticket in wanted.pinned if ticket.ticket_id != ticket_id]

    def _finish(self, content_hash: bytes, pull: EmbeddingPull) -> None:
        del self._pulls[content_hash]
        item = self.cache.publish(content_hash, pull.blocks, pull.ticket.num_tokens)
        for request_id in pull.waiters:
            self.cache.hold(item)
            self._arrive(self._wanted[request_id], content_hash, item)
        self.cache.drop(item)
        self.num_pulled += 1
        self.pulled_bytes += item.num_tokens * self.cache.layout.row_bytes

    def _arrive(self, wanted: _Wanted, content_hash: bytes, item: CachedItem) -> None:
        """The item is here and held for the request, which has no use for its pins any more. Should it be needed again
        after the request has left its room, the words tell whether the encoder still has it."""
        wanted.held[content_hash] = item
        self.release([ticket for ticket in wanted.pinned if ticket.content_hash == content_hash])
        wanted.pinned = [ticket for ticket in wanted.pinned if ticket.content_hash != content_hash]

    def release(self, tickets: Sequence[EmbeddingTicket]) -> None:
        for ticket in tickets:
            self._emit(EmbeddingRelease(ticket))

    def _lose_source(self, address: str, error: KvRelayError) -> None:
        for content_hash, pull in list(self._pulls.items()):
            if pull.ticket.source_address == address and not pull.reads and not pull.is_checking:
                self._lose(content_hash, error)

    def _lose(self, content_hash: bytes, cause: KvRelayError) -> None:
        """Those who wait for the item are told; they end, and come again with another ticket."""
        self.stale_reads += isinstance(cause, StaleTicketError)
        waiters = set(self._pulls[content_hash].waiters)
        self._give_up(content_hash)
        for request_id in sorted(waiters):
            error = EmbeddingLostError(
                f"the embedding of an image cannot be had, encode it again: {cause.message}", media=content_hash.hex()
            )
            self._lost.setdefault(request_id, error)

    def _give_up(self, content_hash: bytes) -> None:
        pull = self._pulls.pop(content_hash)
        self.cache.give_back(pull.idle_blocks())
        for connector, transfer, blocks in pull.destinations():
            self._quarantine.add(pull.ticket.source_address, connector, transfer, blocks)
        self._collect_quarantine()

    def _collect_quarantine(self) -> None:
        self.cache.give_back(self._quarantine.collect())
        for peer_id, connector in self._quarantine.links_over_cap():
            self.peers.tear_down(peer_id, connector)
            self.cache.give_back(self._quarantine.collect())

    # ----------------------------------------------------------------------------------------- accounting

    def check_integrity(self) -> None:
        """Asserts that every block that somebody holds is accounted for; between two steps."""
        held = Counter(
            block for wanted in self._wanted.values() for item in wanted.held.values() for block in item.blocks
        )
        held.update(block for pull in self._pulls.values() for block in pull.blocks)
        assert held.total() + self._quarantine.num_blocks == sum(
            map(self.cache.pool.references, range(1, self.cache.pool.num_blocks))
        ), "blocks of embeddings leaked"
        if not self._quarantine.num_transfers:
            self.cache.check_integrity(held)
