"""What the tests of the prefill service say as a router and as the engine."""

from __future__ import annotations

from typing import Any

import grpc
from worker_rig import RiggedWorker, make_attempt, make_generation, make_ticket, read_one

from kvrelay.v1 import kv_source_pb2, kv_source_pb2_grpc, prefill_pb2_grpc
from kvrelay.v1 import prefill_pb2 as pb
from kvrelay_core.request import FirstToken, Usage
from kvrelay_engine import messages
from kvrelay_prefill.role import PrefillRole
from kvrelay_worker.wire import ticket_to_wire

Fake = RiggedWorker[PrefillRole]


def make_request(attempt: int = 1, request_id: str = "request") -> pb.PrefillRequest:
    return pb.PrefillRequest(attempt=make_attempt(attempt, request_id), generation=make_generation(), handoff=True)


def open_message(handle: int, attempt: int = 1, request_id: str = "request") -> pb.PrefillServiceSessionRequest:
    return pb.PrefillServiceSessionRequest(
        open=pb.PrefillOpen(handle=handle, request=make_request(attempt, request_id))
    )


async def open_session(fake: Fake, channel: grpc.aio.Channel | None = None) -> Any:
    call = prefill_pb2_grpc.PrefillServiceStub(channel or fake.channel).Session(wait_for_ready=True)
    await call.write(pb.PrefillServiceSessionRequest(hello=pb.SessionHello(router_id="router")))
    welcome = (await read_one(call)).welcome
    assert (welcome.worker_id, welcome.engine_epoch) == ("prefill-0", fake.engine.epoch)
    return call


async def read_event(call: Any, handle: int) -> pb.PrefillResponse:
    message = await read_one(call)
    assert message.handle == handle
    event: pb.PrefillResponse = message.event
    return event


async def follow_ticket(fake: Fake) -> tuple[Any, int]:
    """A reader's Follow that the engine has accepted, and its number there."""
    call = kv_source_pb2_grpc.KvSourceServiceStub(fake.channel).Follow()
    ticket = make_ticket(fake.engine, fake.address)
    await call.write(kv_source_pb2.FollowRequest(open=kv_source_pb2.FollowOpen(ticket=ticket_to_wire(ticket))))
    attach = await fake.engine.expect(messages.FollowAttach)
    fake.engine.dispatch(messages.FollowAttached(attach.follow, ticket.lease))
    assert (await read_one(call)).WhichOneof("message") == "attached"
    return call, attach.follow


def say_accepted(fake: Fake, request_id: int) -> None:
    ticket = make_ticket(fake.engine, fake.address)
    fake.engine.dispatch(messages.Accepted(request_id, ticket, cached_tokens=4))


def say_finished(fake: Fake, request_id: int) -> None:
    tokens = (FirstToken(0, 0, 42),)
    fake.engine.dispatch(messages.PrefillFinished(request_id, tokens, Usage(12, 4, 1), 0.1, 0.2))
