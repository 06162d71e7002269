"""What the prefill service does with the tickets of images: tells its engine, connects encoders, gives tickets back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio
from fake_engine import FakeEngine
from msgspec.structs import replace
from prefill_rig import make_request
from worker_rig import RiggedWorker, running_worker, wait_until

from kvrelay.v1 import common_pb2, prefill_pb2_grpc
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import TicketRejectedError
from kvrelay_core.request import MediaReference
from kvrelay_core.rpc.wire import media_reference_to_wire
from kvrelay_encoder.role import EncoderRole
from kvrelay_engine import messages
from kvrelay_engine.embedding_messages import EmbeddingCheck, EmbeddingChecked, EmbeddingRelease, EmbeddingSourceFailed
from kvrelay_prefill.role import PrefillRole
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.ticket import EmbeddingTicket, LeaseTerms
from kvrelay_worker.embedding_wire import embedding_ticket_to_wire

LAYOUT = EmbeddingLayout("float32", 8, 4)
ITEM = b"c" * 32
Prefill = RiggedWorker[PrefillRole]
Encoder = RiggedWorker[EncoderRole]


def make_engine() -> FakeEngine:
    engine = FakeEngine()
    engine.embedding_layout = LAYOUT
    return engine


@pytest_asyncio.fixture
async def encoder() -> AsyncIterator[Encoder]:
    async with running_worker(EncoderRole, FakeEngine(epoch=b"n" * 16, layout=LAYOUT)) as worker:
        yield worker


@pytest_asyncio.fixture
async def prefill() -> AsyncIterator[Prefill]:
    async with running_worker(PrefillRole, make_engine()) as worker:
        yield worker


def ticket_of(encoder: Encoder) -> EmbeddingTicket:
    return EmbeddingTicket(
        ticket_id="t1", source_id="encoder-0", source_address=encoder.address, engine_epoch=encoder.engine.epoch,
        content_hash=ITEM, encoder_fingerprint=b"f" * 32, layout=LAYOUT, blocks=(1,), words=(7,), num_tokens=3,
        lease=LeaseTerms(), mac=b"m" * 32,
    )  # fmt: skip


async def start(prefill: Prefill, ticket: EmbeddingTicket) -> messages.Prefill:
    """A request whose image has two runs of placeholders, which share a ticket."""
    request = make_request()
    for reference in (MediaReference(ITEM, 0, 2), MediaReference(ITEM, 2, 1, first_row=2)):
        wire = media_reference_to_wire(reference)
        wire.ticket.CopyFrom(embedding_ticket_to_wire(ticket))
        request.generation.media.append(wire)
    call = prefill_pb2_grpc.PrefillServiceStub(prefill.channel).Prefill(request)
    command = await prefill.engine.expect(messages.Prefill)
    call.cancel()
    return command


async def test_tickets_reach_the_engine_and_their_encoder_is_connected(prefill: Prefill, encoder: Encoder) -> None:
    ticket = ticket_of(encoder)
    command = await start(prefill, ticket)
    assert command.embeddings == (ticket,)
    assert [reference.first_row for reference in command.generation.media] == [0, 2]
    peer = (await prefill.engine.expect(messages.ConnectPeer)).peer
    assert (peer.peer_id, peer.layout, peer.engine_epoch) == (encoder.address, LAYOUT, encoder.engine.epoch)


async def test_a_ticket_of_no_use_is_released_at_its_encoder(prefill: Prefill, encoder: Encoder) -> None:
    ticket = ticket_of(encoder)
    await start(prefill, ticket)
    await prefill.engine.expect(messages.ConnectPeer)
    prefill.engine.dispatch(EmbeddingRelease(ticket))
    command = await encoder.engine.expect(messages.ReleaseTicket)
    assert command.ticket == ticket
    encoder.engine.dispatch(messages.Released(command.call, True))


async def test_the_engine_hears_of_an_encoder_that_has_restarted(prefill: Prefill, encoder: Encoder) -> None:
    ticket = replace(ticket_of(encoder), engine_epoch=b"o" * 16)
    command = await start(prefill, ticket)
    failed = await prefill.engine.expect(EmbeddingSourceFailed)
    assert (failed.id, failed.source_address) == (command.id, encoder.address)
    assert failed.error.reason == "TicketRejectedError"
    prefill.engine.dispatch(EmbeddingRelease(ticket))  # nobody to tell: the lease went with the encoder's start
    await wait_until(lambda: len(prefill.worker.request_tasks) == 0, "the release was given up")


async def test_an_encoder_of_other_rows_is_not_connected(prefill: Prefill, encoder: Encoder) -> None:
    prefill.engine.embedding_layout = EmbeddingLayout("float32", 16, 4)
    prefill.engine.dispatch(prefill.engine.make_started())
    await start(prefill, ticket_of(encoder))
    assert (await prefill.engine.expect(EmbeddingSourceFailed)).error.reason == "MismatchError"
    assert not prefill.engine.sent_of(messages.ConnectPeer)


async def test_malformed_tickets_are_refused(prefill: Prefill, encoder: Encoder) -> None:
    request = make_request()
    request.generation.media.add(
        content_hash=ITEM, offset=0, num_tokens=2, ticket=common_pb2.EmbeddingTicket(ticket_id="t")
    )
    call: Any = prefill_pb2_grpc.PrefillServiceStub(prefill.channel).Prefill(request)
    assert (await asyncio.wait_for(call.code(), 5)).name == "INVALID_ARGUMENT"
    assert not prefill.engine.sent_of(messages.Prefill)


async def test_the_engine_hears_what_the_encoder_says_of_a_ticket(prefill: Prefill, encoder: Encoder) -> None:
    ticket = ticket_of(encoder)
    await start(prefill, ticket)
    await prefill.engine.expect(messages.ConnectPeer)
    refusal = TicketRejectedError("the signature is not ours", cause="mac")
    answers = []
    for error in (None, refusal):
        prefill.engine.dispatch(EmbeddingCheck(ticket))
        command = await encoder.engine.expect(messages.ReleaseTicket)
        assert command.ticket == ticket
        encoder.engine.dispatch(messages.Released(command.call, False, None if error is None else info_of(error)))
        answers.append(await prefill.engine.expect(EmbeddingChecked))
    accepted, refused = answers
    assert accepted == EmbeddingChecked(ticket.ticket_id)
    assert refused.error is not None
    assert (refused.ticket_id, refused.error.reason) == (ticket.ticket_id, "TicketRejectedError")
