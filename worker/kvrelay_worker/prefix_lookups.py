"""Asks other workers what they have of a request's beginning, when the engine wants it: KvSourceService.Lookup.

Whatever goes wrong is told to the engine as "nothing to be had", which costs the request nothing but the wait. The
engine bounds that wait itself; here a call has the deadline of any call.
"""

from __future__ import annotations

import logging

from kvrelay.v1 import common_pb2
from kvrelay.v1 import kv_source_pb2 as pb
from kvrelay_core.errors import KvRelayError, TicketRejectedError
from kvrelay_core.rpc.wire import attempt_to_wire
from kvrelay_engine.prefix_messages import PrefixFound, PrefixPulled, PrefixWanted
from kvrelay_transfer.ticket import KvTicket
from kvrelay_worker.peer_errors import peer_errors
from kvrelay_worker.peers import PeerBook
from kvrelay_worker.request_trace import PREFIX_PULL, TraceOf
from kvrelay_worker.wire import ticket_from_wire
from kvrelay_worker.worker import Worker

log = logging.getLogger(__name__)


class PrefixLookups:
    def __init__(self, worker: Worker, peers: PeerBook, trace_of: TraceOf) -> None:
        self._worker = worker
        self._peers = peers
        self._trace_of = trace_of
        worker.engine.on(PrefixWanted, self._on_wanted)
        worker.engine.on(PrefixPulled, self._on_pulled)

    def _on_pulled(self, pulled: PrefixPulled) -> None:
        trace = self._trace_of(pulled.id)
        if trace is not None:
            trace.finish(PREFIX_PULL, pulled.timing)

    def _on_wanted(self, wanted: PrefixWanted) -> None:
        trace = self._trace_of(wanted.id)
        if trace is not None:
            trace.begin(PREFIX_PULL)
        self._worker.request_tasks.spawn(self._answer(wanted), f"prefix lookup of request {wanted.id}")

    async def _answer(self, wanted: PrefixWanted) -> None:
        ticket: KvTicket | None = None
        try:
            ticket = await self._ask(wanted)
        except KvRelayError as error:
            log.info("no prefix from %s: %s", wanted.source_address, error.message)
        self._worker.engine.notify(PrefixFound(wanted.id, ticket))

    async def _ask(self, wanted: PrefixWanted) -> KvTicket | None:
        address = wanted.source_address
        stub, info = await self._peers.reach(address)
        request = pb.LookupRequest(
            reader=common_pb2.WorkerRef(worker_id=self._worker.config.worker_id, address=self._worker.address),
            attempt=attempt_to_wire(wanted.attempt),
            model_fingerprint=info.model_fingerprint,
            unit_hashes=wanted.unit_hashes,
        )
        with peer_errors(address):
            response = await stub.Lookup(request, timeout=self._worker.config.call_timeout_s)
        if not response.HasField("ticket"):
            return None
        ticket = ticket_from_wire(response.ticket)
        if ticket.source_address != address or ticket.engine_epoch != info.engine_epoch or ticket.is_pinned:
            raise TicketRejectedError(f"{address} answered with a ticket that is not its own export", cause="source")
        return ticket
