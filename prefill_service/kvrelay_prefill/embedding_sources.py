"""The encoders whose tickets requests bring: connected for the engine, told when a ticket is of no use any more.

Whatever goes wrong with a connection is told to the engine, which ends the requests that wait for it. A Release that
does not arrive costs the encoder the rest of the lease and nobody anything else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvrelay.v1 import kv_source_pb2 as pb
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import KvRelayError
from kvrelay_engine.embedding_messages import EmbeddingCheck, EmbeddingChecked, EmbeddingRelease, EmbeddingSourceFailed
from kvrelay_transfer.ticket import EmbeddingTicket
from kvrelay_worker.embedding_wire import embedding_ticket_to_wire
from kvrelay_worker.peer_errors import peer_errors
from kvrelay_worker.peers import PeerBook
from kvrelay_worker.worker import Worker

log = logging.getLogger(__name__)


class EmbeddingSources:
    def __init__(self, worker: Worker, peers: PeerBook) -> None:
        self._worker = worker
        self._peers = peers
        worker.engine.on(EmbeddingRelease, self._on_release)
        worker.engine.on(EmbeddingCheck, self._on_check)

    def connect(self, request_id: int, tickets: Sequence[EmbeddingTicket]) -> None:
        """In the background, each encoder once."""
        for ticket in {ticket.source_address: ticket for ticket in tickets}.values():
            name = f"encoder of request {request_id}"
            self._worker.request_tasks.spawn(self._connect(request_id, ticket), name)

    async def _connect(self, request_id: int, ticket: EmbeddingTicket) -> None:
        try:
            await self._peers.connect(ticket)
        except KvRelayError as error:
            log.info("no embeddings from %s: %s", ticket.source_address, error.message)
            self._worker.engine.notify(EmbeddingSourceFailed(request_id, ticket.source_address, info_of(error)))

    def _on_release(self, event: EmbeddingRelease) -> None:
        self._worker.request_tasks.spawn(self._give_back(event.ticket), "release of an embedding")

    async def _give_back(self, ticket: EmbeddingTicket) -> None:
        await self._release(ticket)

    def _on_check(self, event: EmbeddingCheck) -> None:
        self._worker.request_tasks.spawn(self._check(event.ticket), "check of an embedding")

    async def _check(self, ticket: EmbeddingTicket) -> None:
        """The encoder looks at the signature before it gives back pins (PROTOCOL D1), whether there are any or not."""
        error = await self._release(ticket)
        checked = EmbeddingChecked(ticket.ticket_id, None if error is None else info_of(error))
        self._worker.engine.notify(checked)

    async def _release(self, ticket: EmbeddingTicket) -> KvRelayError | None:
        request = pb.ReleaseRequest(embedding_ticket=embedding_ticket_to_wire(ticket), reason=pb.RELEASE_REASON_PULLED)
        try:
            stub = await self._peers.connect(ticket)
            with peer_errors(ticket.source_address):
                await stub.Release(request, timeout=self._worker.config.call_timeout_s)
        except KvRelayError as error:
            log.info("an embedding's ticket was not released at %s: %s", ticket.source_address, error.message)
            return error
        return None
