"""EncoderService and the encoder's KvSourceService over a real server, in front of a fake engine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from fake_engine import FakeEngine
from worker_rig import RiggedWorker, running_worker, wait_until

from kvrelay.v1 import common_pb2, encoder_pb2, encoder_pb2_grpc, kv_source_pb2, kv_source_pb2_grpc, worker_pb2
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import InvalidRequestError, KvRelayError, WorkerLostError
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.video import VideoFrames
from kvrelay_core.rpc.status import error_from_rpc
from kvrelay_core.rpc.wire import media_content_to_wire
from kvrelay_encoder.role import EncoderRole
from kvrelay_engine.encoder_messages import EncodeItem, ItemEncoded
from kvrelay_engine.messages import Abort, Export, Exported, Released, ReleaseTicket
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import EmbeddingTicket, LeaseTerms
from kvrelay_worker.embedding_wire import (
    connect_to_wire,
    embedding_layout_to_wire,
    embedding_ticket_from_wire,
    embedding_ticket_to_wire,
)

LAYOUT = EmbeddingLayout("float32", 8, 4)
KV = KvLayout(dtype="float32", num_layers=1, num_kv_heads=1, block_tokens=4, head_dim=8, hash_unit_tokens=4)
Fake = RiggedWorker[EncoderRole]


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[Fake]:
    async with running_worker(EncoderRole, FakeEngine(layout=LAYOUT)) as worker:
        yield worker
        assert len(worker.role.items) == 0 and worker.worker.num_live_requests == 0


def ticket_for(fake: Fake, command: EncodeItem) -> EmbeddingTicket:
    return EmbeddingTicket(
        ticket_id=f"t{command.id}", source_id="encoder-0", source_address=fake.address, engine_epoch=fake.engine.epoch,
        content_hash=command.content_hash, encoder_fingerprint=b"f" * 32, layout=LAYOUT, blocks=(command.id,),
        words=(7,), num_tokens=3, lease=LeaseTerms(), mac=b"m" * 32,
    )  # fmt: skip


def request_of(*data: bytes, **fields: Any) -> encoder_pb2.EncodeRequest:
    return encoder_pb2.EncodeRequest(media=[common_pb2.MediaItem(data=one) for one in data], **fields)


def encode(fake: Fake, request: encoder_pb2.EncodeRequest) -> Any:
    return encoder_pb2_grpc.EncoderServiceStub(fake.channel).Encode(request)


async def error_of_call(call: Any) -> KvRelayError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value, "encoder")


async def test_each_item_gets_a_ticket_in_the_order_asked(fake: Fake) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"two").decode()
    request = request_of(b"one")
    request.media.add(url=url)
    call = encode(fake, request)
    first, second = [await fake.engine.expect(EncodeItem) for _ in range(2)]
    assert [(one.data, one.content_hash) for one in (first, second)] == [
        (b"one", media_hash(b"one", b"model")), (b"two", media_hash(b"two", b"model"))
    ]  # fmt: skip
    for command in (second, first):
        fake.engine.dispatch(ItemEncoded(command.id, ticket_for(fake, command)))
    tickets = [embedding_ticket_from_wire(wire) for wire in (await call).tickets]
    assert tickets == [ticket_for(fake, first), ticket_for(fake, second)]
    assert not fake.engine.sent_of(ReleaseTicket)


async def test_a_bad_item_is_named_and_the_others_are_given_back(fake: Fake) -> None:
    call = encode(fake, request_of(b"good", b"bad", b"slow"))
    good, bad, slow = [await fake.engine.expect(EncodeItem) for _ in range(3)]
    fake.engine.dispatch(ItemEncoded(good.id, ticket_for(fake, good)))
    fake.engine.dispatch(ItemEncoded(bad.id, error=info_of(InvalidRequestError("this is no image"))))
    error = await error_of_call(call)
    assert isinstance(error, InvalidRequestError) and error.metadata["media_index"] == "1"
    assert "media[1]: this is no image" in error.message
    assert (await fake.engine.expect(ReleaseTicket)).ticket == ticket_for(fake, good)
    assert (await fake.engine.expect(Abort)).id == slow.id
    fake.engine.dispatch(ItemEncoded(slow.id, ticket_for(fake, slow)))  # it crossed with the abort
    assert (await fake.engine.expect(ReleaseTicket)).ticket == ticket_for(fake, slow)


async def test_a_video_goes_to_the_engine_as_it_came(fake: Fake) -> None:
    video = VideoFrames((b"one", b"two"), 2.5)
    request = request_of(b"picture")
    request.media.append(media_content_to_wire(video))
    call = encode(fake, request)
    first, second = [await fake.engine.expect(EncodeItem) for _ in range(2)]
    assert (first.data, second.data) == (b"picture", video)
    assert second.content_hash == media_hash(video, b"model")
    for command in (first, second):
        fake.engine.dispatch(ItemEncoded(command.id, ticket_for(fake, command)))
    assert len((await call).tickets) == 2


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (VideoFrames((), 1.0), "0 frames"),
        (VideoFrames((b"x",) * 257, 1.0), "257 frames"),
        (VideoFrames((b"x",), 0.0), "fps is 0"),
        (VideoFrames((bytes(10 << 20), bytes((10 << 20) + 1)), 1.0), "bytes together"),
    ],
    ids=["no frame", "too many", "no rate", "too large"],
)
async def test_what_is_no_video_never_reaches_the_engine(fake: Fake, video: VideoFrames, message: str) -> None:
    request = request_of(b"picture")
    request.media.append(media_content_to_wire(video))
    error = await error_of_call(encode(fake, request))
    assert isinstance(error, InvalidRequestError) and message in error.message
    assert error.metadata["media_index"] == "1"
    assert not fake.engine.sent_of(EncodeItem)


async def test_a_client_that_leaves_gives_its_items_up(fake: Fake) -> None:
    call = encode(fake, request_of(b"picture"))
    command = await fake.engine.expect(EncodeItem)
    call.cancel()
    assert (await fake.engine.expect(Abort)).id == command.id


async def test_a_deadline_ends_the_wait(fake: Fake) -> None:
    call = encode(fake, request_of(b"picture", deadline_s=0.05))
    command = await fake.engine.expect(EncodeItem)
    assert (await error_of_call(call)).reason == "DeadlineError"
    assert (await fake.engine.expect(Abort)).id == command.id


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_of(), "InvalidRequestError"),
        (request_of(b"x", b""), "InvalidRequestError"),
        (request_of(*[b"x"] * 33), "InvalidRequestError"),
        (request_of(b"x" * ((20 << 20) + 1)), "InvalidRequestError"),
        (request_of(b"x", deadline_s=float("nan")), "InvalidRequestError"),
        (encoder_pb2.EncodeRequest(media=[common_pb2.MediaItem(url="http://10.0.0.1/x.png")]), "UnsupportedError"),
    ],
    ids=["none", "empty", "too many", "too large", "deadline", "url"],
)
async def test_what_cannot_be_encoded_never_reaches_the_engine(
    fake: Fake, request_: encoder_pb2.EncodeRequest, reason: str
) -> None:
    assert (await error_of_call(encode(fake, request_))).reason == reason
    assert not fake.engine.sent_of(EncodeItem)


async def test_a_draining_encoder_takes_nothing_new(fake: Fake) -> None:
    fake.worker.request_drain(30.0)
    assert (await error_of_call(encode(fake, request_of(b"x")))).reason == "DrainingError"


async def test_those_who_wait_hear_of_a_lost_engine() -> None:
    async with running_worker(EncoderRole, FakeEngine(layout=LAYOUT)) as fake:
        call = encode(fake, request_of(b"x"))
        await fake.engine.expect(EncodeItem)
        fake.engine.die()
        assert isinstance(await error_of_call(call), WorkerLostError)


async def test_those_who_wait_hear_of_an_engine_that_stands_still(fake: Fake) -> None:
    """So do those who come meanwhile; when it moves again it is asked again, and what it made is given back."""
    call = encode(fake, request_of(b"x"))
    command = await fake.engine.expect(EncodeItem)
    fake.engine.declare_silent(3.0)
    error = await error_of_call(call)
    assert isinstance(error, WorkerLostError) and "has not moved for 3.0 s" in error.message
    assert (await fake.engine.expect(Abort)).id == command.id
    assert isinstance(await error_of_call(encode(fake, request_of(b"y"))), WorkerLostError)
    assert len(fake.engine.sent_of(EncodeItem)) == 1
    fake.engine.dispatch(ItemEncoded(command.id, ticket_for(fake, command)))  # it moves
    assert (await fake.engine.expect(ReleaseTicket)).ticket == ticket_for(fake, command)
    again = encode(fake, request_of(b"y"))
    command = await fake.engine.expect(EncodeItem)
    fake.engine.dispatch(ItemEncoded(command.id, ticket_for(fake, command)))
    assert len((await again).tickets) == 1


async def test_a_reader_does_not_wait_for_an_engine_that_stands_still(fake: Fake) -> None:
    stub = kv_source_pb2_grpc.KvSourceServiceStub(fake.channel)
    ticket = embedding_ticket_to_wire(ticket_for(fake, EncodeItem(1, b"c" * 32, b"")))
    fetch = kv_source_pb2.FetchRequest(embedding_ticket=ticket, blocks=[1])
    releasing: Any = stub.Release(kv_source_pb2.ReleaseRequest(embedding_ticket=ticket))
    fetching: Any = stub.Fetch(fetch)
    export = await fake.engine.expect(Export)
    await fake.engine.expect(ReleaseTicket)
    fake.engine.declare_silent(3.0)
    assert (await error_of_call(releasing)).reason == "HandoffError"
    for read in (fetching.read(), stub.Fetch(fetch).read()):
        assert (await error_of_call(read)).reason in ("TransferError", "HandoffError")
    fake.engine.dispatch(Exported(export.export, (7,)))  # it moves: the slot is free again
    await wait_until(lambda: fake.worker.slots.exports.num_taken == 0, "the slot is free")


async def test_an_engine_that_takes_no_more_items_leaves_nothing_behind(fake: Fake) -> None:
    """Its socket fails between two items of one call."""
    send = fake.engine.send

    def fail_at_the_second(command: Any) -> None:
        if isinstance(command, EncodeItem) and fake.engine.sent_of(EncodeItem):
            raise WorkerLostError("the engine takes no commands")
        send(command)

    fake.engine.send = fail_at_the_second  # type: ignore[method-assign]
    assert isinstance(await error_of_call(encode(fake, request_of(b"x", b"y"))), WorkerLostError)
    assert len(fake.role.items) == 0
    [command] = fake.engine.sent_of(EncodeItem)
    assert (await fake.engine.expect(Abort)).id == command.id


async def test_an_encoder_describes_its_pool(fake: Fake) -> None:
    described = await WorkerServiceStub(fake.channel).Describe(worker_pb2.DescribeRequest())
    assert described.role == worker_pb2.ROLE_ENCODER
    assert list(described.embedding_layouts) == [embedding_layout_to_wire(LAYOUT)] and not described.layouts


async def test_a_reader_shakes_hands_and_releases(fake: Fake) -> None:
    stub = kv_source_pb2_grpc.KvSourceServiceStub(fake.channel)
    reader = common_pb2.WorkerRef(worker_id="prefill-0", address="a:1")
    answer = await stub.Connect(connect_to_wire(reader, [], (KV, LAYOUT)))
    assert list(answer.embedding_layouts) == [embedding_layout_to_wire(LAYOUT)] and not answer.layouts
    refused = stub.Connect(connect_to_wire(reader, [], (KV, EmbeddingLayout("float32", 16, 4))))
    assert (await error_of_call(refused)).reason == "MismatchError"
    ticket = ticket_for(fake, EncodeItem(1, b"c" * 32, b""))
    releasing = asyncio.ensure_future(_release(stub, ticket))
    command = await fake.engine.expect(ReleaseTicket)
    assert command.ticket == ticket
    fake.engine.dispatch(Released(command.call, True))
    assert await releasing


async def _release(stub: Any, ticket: EmbeddingTicket) -> bool:
    wire = embedding_ticket_to_wire(ticket)
    response = await stub.Release(kv_source_pb2.ReleaseRequest(embedding_ticket=wire))
    return bool(response.released)


async def test_an_encoder_has_nothing_to_follow(fake: Fake) -> None:
    stub = kv_source_pb2_grpc.KvSourceServiceStub(fake.channel)
    call: Any = stub.Follow()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert error_from_rpc(caught.value, "encoder").reason == "UnsupportedError"
    assert (await error_of_call(stub.Lookup(kv_source_pb2.LookupRequest()))).reason == "UnsupportedError"
    await wait_until(lambda: fake.worker.streams.value == 0, "no stream is left")
