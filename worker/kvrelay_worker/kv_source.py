"""KvSourceService: lets other workers read this worker's KV, or its embeddings.

It owns the streams; the engine verifies tickets, holds pins and copies blocks. Knows nothing of prefill.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kvrelay.v1 import common_pb2, kv_source_pb2_grpc
from kvrelay.v1 import kv_source_pb2 as pb
from kvrelay_core.error_info import error_of
from kvrelay_core.errors import DeadlineError, InvalidRequestError, KvRelayError, MismatchError
from kvrelay_core.hashing import HASH_BYTES
from kvrelay_core.rpc.wire import attempt_from_wire
from kvrelay_engine.messages import Released, ReleaseTicket
from kvrelay_engine.prefix_messages import LookupPrefix, PrefixTicket
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import KvTicket, Ticket
from kvrelay_worker.embedding_wire import check_reader, embedding_layout_to_wire, readable_from_wire
from kvrelay_worker.engine_link import PendingCalls
from kvrelay_worker.exports import Exports
from kvrelay_worker.follows import FollowBook, FollowEnd, FollowObserver, FollowStream
from kvrelay_worker.stream_end import Context, at_stream_end, guard_stream, until_stream_end
from kvrelay_worker.wire import (
    layout_to_wire,
    offer_to_wire,
    release_reason_from_wire,
    ticket_from_wire,
    ticket_to_wire,
)
from kvrelay_worker.worker import Worker

CHUNK_BYTES = 2 * 2**20


class KvSourceServicer(kv_source_pb2_grpc.KvSourceServiceServicer):
    def __init__(self, worker: Worker, observer: FollowObserver | None = None) -> None:
        self._worker = worker
        self._exports = Exports(worker)
        self._observer = observer
        self.follows = FollowBook(worker.engine, observer)
        self._releases: PendingCalls[Released] = PendingCalls(worker.engine)
        worker.engine.on(Released, lambda released: self._releases.answer(released.call, released))
        self._lookups: PendingCalls[PrefixTicket] = PendingCalls(worker.engine)
        worker.engine.on(PrefixTicket, lambda answer: self._lookups.answer(answer.call, answer))

    def give_up_waiting(self, error: KvRelayError) -> None:
        """The engine does not move: whoever waits for it to copy blocks or to release a ticket is told so."""
        self._releases.fail_all(error)
        self._exports.give_up_waiting()

    async def Connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectResponse:
        """Raises MismatchError when the reader's pool cannot take our blocks."""
        started = self._worker.engine.started
        check_reader(request, started.groups)
        layout = started.layout
        return pb.ConnectResponse(
            source=common_pb2.WorkerRef(worker_id=self._worker.config.worker_id, address=self._worker.address),
            engine_epoch=started.engine_epoch,
            model_fingerprint=started.model_fingerprint,
            offers=map(offer_to_wire, started.offers),
            layouts=[layout_to_wire(layout)] if isinstance(layout, KvLayout) else (),
            embedding_layouts=[embedding_layout_to_wire(layout)] if isinstance(layout, EmbeddingLayout) else (),
            more_pools=[
                pb.PoolOffer(layout=layout_to_wire(pool.layout), offers=map(offer_to_wire, pool.offers))
                for pool in started.more_pools
                if isinstance(pool.layout, KvLayout)
            ],
        )

    async def Follow(
        self, request_iterator: AsyncIterator[pb.FollowRequest], context: Context
    ) -> AsyncIterator[pb.FollowResponse]:
        """A stream that ends without `release` counts as lost."""
        _ = self._worker.engine.started
        ticket = ticket_from_wire((await self._first(request_iterator)).ticket)
        stream = self.follows.open(ticket)
        self._worker.streams.enter()
        reading = guard_stream(stream.outbox, _read_follow, stream, request_iterator)
        reader = self._worker.request_tasks.spawn(reading, "follow reader")

        def end() -> None:
            stream.lose()
            reader.cancel()
            self._worker.streams.leave()

        at_stream_end(context, end)
        async for response in stream.outbox:
            yield response

    async def _first(self, requests: AsyncIterator[pb.FollowRequest]) -> pb.FollowOpen:
        try:
            async with asyncio.timeout(self._worker.config.call_timeout_s):
                first = await anext(requests, None)
        except TimeoutError as error:
            raise DeadlineError("no `open` came on the Follow stream") from error
        if first is None or first.WhichOneof("message") != "open":
            raise InvalidRequestError("the first message of a Follow stream must be `open`")
        return first.open

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.FetchResponse]:
        ticket = readable_from_wire(request)
        blocks = tuple(request.blocks)
        if not blocks:
            raise InvalidRequestError("Fetch names no blocks")
        slots = self._worker.slots.exports
        held: set[int] = set()  # slots of ours that no engine works on
        self._worker.streams.enter()

        def end() -> None:
            for slot in held:
                slots.release(slot)
            self._worker.streams.leave()

        at_stream_end(context, end)
        async for response in self._stream_blocks(ticket, request.group, blocks, held):
            yield response

    async def _stream_blocks(
        self, ticket: Ticket, group: int, blocks: tuple[int, ...], held: set[int]
    ) -> AsyncIterator[pb.FetchResponse]:
        staging, groups = self._worker.slots, self._worker.engine.started.groups
        if group >= len(groups):
            raise InvalidRequestError(f"this worker has {len(groups)} KV groups, none with the number {group}")
        block_bytes = groups[group].block_bytes
        blocks_per_slot = staging.slot_bytes // block_bytes
        words: list[int] = []
        for first in range(0, len(blocks), blocks_per_slot):
            part = blocks[first : first + blocks_per_slot]
            piece = await self._exports.export(ticket, group, part)
            held.add(piece.slot)
            words += piece.words
            size_bytes = len(part) * block_bytes
            for offset in range(0, size_bytes, CHUNK_BYTES):
                yield pb.FetchResponse(data=staging.read(piece.slot, offset, min(CHUNK_BYTES, size_bytes - offset)))
            held.remove(piece.slot)
            staging.exports.release(piece.slot)
        yield pb.FetchResponse(words=words, last=True)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        ticket = readable_from_wire(request)
        timeout_s = self._worker.config.call_timeout_s
        released = await self._releases.ask(lambda call: ReleaseTicket(call, ticket), timeout_s)
        if released.error is not None:
            raise error_of(released.error)
        if self._observer is not None and isinstance(ticket, KvTicket):
            self._observer.on_unfollowed(ticket.attempt, FollowEnd.ENDED)
        return pb.ReleaseResponse(released=released.released)

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        """Raises MismatchError for another model, InvalidRequestError for what is no chain of hashes."""
        attempt, unit_hashes = attempt_from_wire(request.attempt), request.unit_hashes
        if not unit_hashes or len(unit_hashes) % HASH_BYTES:
            raise InvalidRequestError(f"unit_hashes must be one or more hashes of {HASH_BYTES} bytes")
        if request.model_fingerprint != self._worker.engine.started.model_fingerprint:
            raise MismatchError("this worker serves another model; its KV is of no use to you")
        timeout_s = self._worker.config.call_timeout_s
        found = await self._lookups.ask(lambda call: LookupPrefix(call, attempt, unit_hashes), timeout_s)
        return pb.LookupResponse(ticket=None if found.ticket is None else ticket_to_wire(found.ticket))


async def _read_follow(stream: FollowStream, requests: AsyncIterator[pb.FollowRequest]) -> None:
    async for request in until_stream_end(requests):
        match request.WhichOneof("message"):
            case "alive":
                stream.beat()
            case "release":
                stream.release(release_reason_from_wire(request.release.reason))
                return
            case _:
                stream.outbox.fail(InvalidRequestError("after `open` only `alive` and `release` may follow"))
                break
    stream.lose()
