"""The encoder's side of reading embeddings: issues tickets, pins their items under a lease, serves the bytes.

A lease ends with the reader's Release or with its time, whichever is first; the item stays in the cache until it is
evicted, and a reader that is late is told by the words whether it still is what the ticket says. Every use of a ticket
begins with its signature (PROTOCOL D1).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import InternalError, TicketRejectedError, TransferError
from kvrelay_engine.embeddings.cache import CachedItem, EmbeddingCache
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.kv_group import SlotWriter
from kvrelay_engine.messages import Command, Event, Export, Exported, Released, ReleaseTicket
from kvrelay_transfer.connectors.base import Connector
from kvrelay_transfer.lease import Lease, LeaseEnd, LeaseTable
from kvrelay_transfer.ticket import EmbeddingTicket, LeaseTerms, Ticket, TicketSigner


class EmbeddingSource:
    def __init__(
        self,
        cache: EmbeddingCache,
        identity: EngineIdentity,
        signer: TicketSigner,
        terms: LeaseTerms,
        clock: Clock,
        emit: Callable[[Event], None],
        *,
        staging: SlotWriter | None = None,
        connectors: Collection[Connector] = (),
    ) -> None:
        """A ticket is pinned for `terms.first_follow_s`. Without `staging` exports fail; `connectors` serve while there
        are tickets. `identity.model_fingerprint` is the encoder's."""
        self._cache = cache
        self._identity = identity
        self._signer = signer
        self._terms = terms
        self._emit = emit
        self._staging = staging
        self._connectors = connectors
        self._is_serving = False
        self._leases = LeaseTable(clock, self._lease_ended)
        self._items: dict[str, CachedItem] = {}  # by ticket id
        self.num_expired = 0

    @property
    def num_leases(self) -> int:
        return self._leases.num_leases

    @property
    def num_pinned(self) -> int:
        """Unique blocks under a lease."""
        return self._leases.num_pinned

    def holds(self) -> Counter[int]:
        """References to blocks by leases."""
        return Counter(block for item in self._items.values() for block in item.blocks)

    def issue(self, item: CachedItem) -> EmbeddingTicket:
        """Pins the item for as long as the lease lasts."""
        ticket = self._signer.sign(
            EmbeddingTicket(
                ticket_id=secrets.token_hex(16),
                source_id=self._identity.worker_id,
                source_address=self._identity.address,
                engine_epoch=self._identity.engine_epoch,
                content_hash=item.content_hash,
                encoder_fingerprint=self._identity.model_fingerprint,
                layout=self._cache.layout,
                blocks=item.blocks,
                words=item.words,
                num_tokens=item.num_tokens,
                lease=self._terms,
            )
        )
        self._cache.hold(item)
        self._items[ticket.ticket_id] = item
        self._leases.grant(ticket.ticket_id, item.blocks, ticket.lease)
        self._serve()
        return ticket

    def tick(self) -> None:
        """Ends leases whose time is over. Call after the commands that have queued up were handled."""
        self._leases.tick()

    def handle(self, command: Command) -> None:
        match command:
            case ReleaseTicket(call, ticket):
                self._release(call, ticket)
            case Export():
                self._export(command)
            case _:
                raise InternalError(f"the source of embeddings was given a {type(command).__name__}")

    def check_export(self, ticket: Ticket, group: int, blocks: Sequence[int]) -> None:
        """As `ExportGate` says."""
        self._signer.verify(ticket)
        if not isinstance(ticket, EmbeddingTicket):
            raise TicketRejectedError("this engine holds embeddings, and the ticket is for KV", cause="kind")
        if group != 0 or not set(blocks) <= set(ticket.blocks):
            raise TransferError("blocks were asked for that the ticket does not list")

    def close(self) -> None:
        """Ends every lease."""
        for ticket_id in list(self._items):
            self._leases.end(ticket_id, LeaseEnd.RELEASED)

    def _release(self, call: int, ticket: Ticket) -> None:
        try:
            self._signer.verify(ticket)
        except TicketRejectedError as error:
            self._emit(Released(call, False, info_of(error)))
            return
        self._emit(Released(call, self._leases.end(ticket.ticket_id, LeaseEnd.RELEASED)))

    def _export(self, export: Export) -> None:
        try:
            words = self._copy_out(export)
        except (TicketRejectedError, TransferError) as error:
            self._emit(Exported(export.export, (), info_of(error)))
            return
        self._emit(Exported(export.export, words))

    def _copy_out(self, export: Export) -> tuple[int, ...]:
        """Data first, then the words (PROTOCOL A6)."""
        self.check_export(export.ticket, export.group, export.blocks)
        if self._staging is None:
            raise TransferError("this engine has no staging ring; it cannot serve Fetch")
        self._staging.copy_out(export.blocks, export.slot)
        return tuple(map(self._cache.pool.word, export.blocks))

    def _serve(self) -> None:
        is_wanted = self._leases.num_leases > 0
        if is_wanted is not self._is_serving:
            self._is_serving = is_wanted
            for connector in self._connectors:
                connector.serve(self if is_wanted else None)

    def _lease_ended(self, lease: Lease, reason: LeaseEnd) -> None:
        self._cache.drop(self._items.pop(lease.ticket_id))
        self.num_expired += reason.is_expiry
        self._serve()
