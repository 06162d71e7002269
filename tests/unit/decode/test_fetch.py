"""The grpc connector's socket halves against each other: a source and a reader with real servers and staging rings,
the fake engines copying into and out of the slots as real ones do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from cuttable_proxy import cuttable_proxy
from fake_engine import FakeEngine
from worker_rig import RiggedWorker, make_ticket, running_worker, wait_until

from kvrelay.v1 import kv_source_pb2, kv_source_pb2_grpc
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import TicketRejectedError
from kvrelay_decode.role import DecodeRole
from kvrelay_engine import messages
from kvrelay_prefill.role import PrefillRole
from kvrelay_transfer.ticket import KvTicket
from kvrelay_worker.wire import ticket_to_wire

NUM_BLOCKS = 7  # in four pieces of at most two, the last one of one block


def block_bytes(engine: FakeEngine, block: int) -> bytes:
    return bytes((block * 31 + index) % 251 for index in range(engine.layout.block_bytes))


class Pair:
    def __init__(self, source: RiggedWorker[PrefillRole], reader: RiggedWorker[DecodeRole], ticket: KvTicket) -> None:
        self.source = source
        self.reader = reader
        self.ticket = ticket
        self.pool: dict[int, bytes] = {}  # what the reader's engine has copied in, by index within the read
        self.words: dict[int, int] = {}

    def fetch(self, read: int = 1) -> None:
        event = messages.Fetch(read, self.ticket.source_address, self.ticket, 0, self.ticket.groups[0].blocks)
        self.reader.engine.dispatch(event)

    async def export_next(self) -> None:
        """The source's engine answers one Export."""
        engine = self.source.engine
        export = await engine.expect(messages.Export)
        assert engine.staging is not None
        data = b"".join(block_bytes(engine, block) for block in export.blocks)
        with engine.staging.slot(export.slot) as view:
            view[: len(data)] = data
        words = tuple(100 + block for block in export.blocks)
        engine.dispatch(messages.Exported(export.export, words))

    async def take_next(self) -> None:
        """The reader's engine copies one piece out of its slot and gives the slot back."""
        engine = self.reader.engine
        piece = await engine.expect(messages.FetchedPiece)
        assert engine.staging is not None
        size = engine.layout.block_bytes
        with engine.staging.slot(piece.slot) as view:
            for index, word in enumerate(piece.words):
                self.pool[piece.first + index] = bytes(view[index * size : (index + 1) * size])
                self.words[piece.first + index] = word
        engine.dispatch(messages.SlotFree(piece.slot))


@asynccontextmanager
async def connected_pair(**changes: Any) -> AsyncIterator[Pair]:
    async with running_worker(PrefillRole, **changes) as source, running_worker(DecodeRole, **changes) as reader:
        ticket = make_ticket(source.engine, source.address, NUM_BLOCKS)
        await reader.role.peers.connect(ticket)
        yield Pair(source, reader, ticket)


async def test_every_byte_and_word_arrives_through_few_slots() -> None:
    async with connected_pair() as pair:
        pair.fetch()
        for _ in range(4):
            await pair.export_next()
            await pair.take_next()
        assert await pair.reader.engine.expect(messages.FetchEnded) == messages.FetchEnded(1, None)
        blocks = pair.ticket.groups[0].blocks
        assert [pair.pool[index] for index in range(NUM_BLOCKS)] == [
            block_bytes(pair.source.engine, block) for block in blocks
        ]
        assert tuple(pair.words[index] for index in range(NUM_BLOCKS)) == pair.ticket.groups[0].words


async def test_a_reader_without_free_slots_waits_for_its_engine() -> None:
    async with connected_pair() as pair:
        pair.fetch()
        for _ in range(2):
            await pair.export_next()
        imports = pair.reader.worker.slots.imports
        await wait_until(lambda: len(pair.reader.engine.sent_of(messages.FetchedPiece)) == 2, "two pieces are here")
        assert imports.num_taken == 2
        assert len(pair.source.engine.sent_of(messages.Export)) == 2
        await pair.take_next()
        await pair.export_next()
        for _ in range(2):
            await pair.take_next()
        await pair.export_next()
        await pair.take_next()
        assert (await pair.reader.engine.expect(messages.FetchEnded)).error is None


async def test_a_refused_export_ends_the_read_with_the_sources_error() -> None:
    async with connected_pair() as pair:
        pair.fetch()
        error = info_of(TicketRejectedError("forged", cause="mac"))
        export = await pair.source.engine.expect(messages.Export)
        pair.source.engine.dispatch(messages.Exported(export.export, (), error))
        ended = await pair.reader.engine.expect(messages.FetchEnded)
        assert ended.error is not None
        assert ended.error.reason == "TicketRejectedError"
        # The other piece's export was under way; its slot comes back with the engine's answer.
        await pair.export_next()


async def test_an_aborted_read_gives_every_slot_back_once_the_engines_are_through() -> None:
    async with connected_pair() as pair:
        pair.fetch()
        first = await pair.source.engine.expect(messages.Export)
        second = await pair.source.engine.expect(messages.Export)
        pair.reader.engine.dispatch(messages.FetchAbort(1))
        ended = await pair.reader.engine.expect(messages.FetchEnded)
        assert ended.error is not None
        assert ended.error.reason == "RequestCancelledError"
        assert pair.reader.worker.slots.imports.num_taken == 0
        await wait_until(lambda: pair.source.worker.streams.value == 0, "the calls have ended")
        # The source's engine may still be writing to them.
        assert pair.source.worker.slots.exports.num_taken == 2
        for export in (first, second):
            pair.source.engine.dispatch(messages.Exported(export.export, (1, 2)))
        assert pair.source.worker.slots.exports.num_taken == 0


async def test_a_read_aborted_before_it_began_is_ended_too() -> None:
    async with connected_pair() as pair:
        pair.fetch()
        pair.reader.engine.dispatch(messages.FetchAbort(1))
        ended = await pair.reader.engine.expect(messages.FetchEnded)
        assert ended.error is not None
        assert ended.error.reason == "RequestCancelledError"


async def test_a_read_that_breaks_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected_pair() as pair:

        def break_down(*_: object) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(pair.reader.worker.slots, "write", break_down)
        pair.fetch()
        await pair.export_next()
        ended = await pair.reader.engine.expect(messages.FetchEnded)
        assert ended.error is not None
        assert ended.error.reason == "InternalError"
        await pair.export_next()


async def test_a_reader_that_loses_its_engine_stops_reading() -> None:
    async with connected_pair() as pair:
        pair.fetch()
        exports = [await pair.source.engine.expect(messages.Export) for _ in range(2)]
        pair.reader.engine.die()
        await wait_until(lambda: len(pair.reader.worker.request_tasks) == 0, "the read has ended")
        for export in exports:
            pair.source.engine.dispatch(messages.Exported(export.export, (1, 2)))


async def test_a_source_that_sends_nothing_ends_the_read_by_its_deadline() -> None:
    async with connected_pair(fetch_timeout_s=0.2) as pair:
        pair.fetch()
        ended = await pair.reader.engine.expect(messages.FetchEnded)
        assert ended.error is not None
        assert ended.error.reason in ("TransferError", "OverloadedError")
        for export in pair.source.engine.sent_of(messages.Export):
            pair.source.engine.dispatch(messages.Exported(export.export, (1, 2)))


async def test_a_source_that_dies_ends_the_read_as_lost() -> None:
    async with connected_pair() as pair:
        pair.fetch()
        await pair.source.engine.expect(messages.Export)
        await pair.source.server.stop()
        ended = await pair.reader.engine.expect(messages.FetchEnded)
        assert ended.error is not None
        assert ended.error.reason == "WorkerLostError"
        for export in pair.source.engine.sent_of(messages.Export):
            pair.source.engine.dispatch(messages.Exported(export.export, (1, 2)))


async def test_a_piece_whose_transport_is_lost_is_fetched_again() -> None:
    async with running_worker(PrefillRole) as source, cuttable_proxy(source.address) as proxy:
        async with running_worker(DecodeRole, follow_grace_s=5.0) as reader:
            pair = Pair(source, reader, make_ticket(source.engine, proxy.address, num_blocks=2))
            await reader.role.peers.connect(pair.ticket)
            pair.fetch()
            lost = await source.engine.expect(messages.Export)
            proxy.cut()
            source.engine.dispatch(messages.Exported(lost.export, (1, 2)))
            await pair.export_next()
            await pair.take_next()
            assert (await reader.engine.expect(messages.FetchEnded)).error is None
            assert (pair.words, len(pair.pool)) == ({0: 101, 1: 102}, 2)


async def test_the_source_streams_all_blocks_of_one_call_and_the_words_last() -> None:
    async with connected_pair() as pair:
        stub = kv_source_pb2_grpc.KvSourceServiceStub(pair.source.channel)
        blocks = pair.ticket.groups[0].blocks
        request = kv_source_pb2.FetchRequest(ticket=ticket_to_wire(pair.ticket), group=0, blocks=blocks)
        exporting = asyncio.gather(*(pair.export_next() for _ in range(4)))
        responses = [response async for response in stub.Fetch(request)]
        await exporting
        assert b"".join(response.data for response in responses) == b"".join(
            block_bytes(pair.source.engine, block) for block in blocks
        )
        assert [response.last for response in responses] == [False] * (len(responses) - 1) + [True]
        assert tuple(responses[-1].words) == pair.ticket.groups[0].words


async def test_a_fetch_of_nothing_is_refused() -> None:
    async with connected_pair() as pair:
        stub = kv_source_pb2_grpc.KvSourceServiceStub(pair.source.channel)
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Fetch(kv_source_pb2.FetchRequest(ticket=ticket_to_wire(pair.ticket))).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
