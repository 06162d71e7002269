"""KvSourceService over a real server: Connect, Follow and Release in front of a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from fake_engine import LAYOUT
from msgspec.structs import replace
from worker_rig import RiggedWorker, make_ticket, read_one, running_worker, wait_until

from kvrelay.v1 import kv_source_pb2 as pb
from kvrelay.v1 import kv_source_pb2_grpc
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import KvRelayError, LeaseExpiredError, SupersededError, TicketRejectedError
from kvrelay_core.request import AttemptId, FirstToken
from kvrelay_core.rpc.server import RpcServer
from kvrelay_engine import messages
from kvrelay_transfer.ticket import GroupBlocks, LeaseTerms
from kvrelay_worker.follows import FollowEnd, FollowStream
from kvrelay_worker.kv_source import KvSourceServicer
from kvrelay_worker.server import Role
from kvrelay_worker.wire import layout_to_wire, ticket_to_wire
from kvrelay_worker.worker import Worker


class SourceRole(Role):
    service_names = ("kvrelay.v1.KvSourceService",)

    def __init__(self, worker: Worker) -> None:
        self.heard: list[tuple[AttemptId, FollowEnd | None]] = []  # None: followed
        self.servicer = KvSourceServicer(worker, self)

    def on_followed(self, attempt: AttemptId) -> None:
        self.heard.append((attempt, None))

    def on_unfollowed(self, attempt: AttemptId, end: FollowEnd) -> None:
        self.heard.append((attempt, end))

    def add_to(self, server: RpcServer) -> None:
        kv_source_pb2_grpc.add_KvSourceServiceServicer_to_server(self.servicer, server.server)

    def end_all(self, error: KvRelayError) -> None:
        self.servicer.follows.end_all(error)

    async def close(self) -> None:
        """Holds nothing."""


ATTEMPT = AttemptId("router", "request", 1)
Fake = RiggedWorker[SourceRole]
RELEASE = pb.FollowRequest(release=pb.FollowRelease(reason=pb.RELEASE_REASON_PULLED))


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[Fake]:
    async with running_worker(SourceRole) as worker:
        yield worker
        assert len(worker.role.servicer.follows) == 0


def stub_of(fake: Fake) -> Any:
    return kv_source_pb2_grpc.KvSourceServiceStub(fake.channel)


async def attach(fake: Fake) -> tuple[Any, int]:
    """A Follow call that the engine has accepted, and its number there."""
    call = stub_of(fake).Follow()
    ticket = make_ticket(fake.engine, fake.address)
    await call.write(pb.FollowRequest(open=pb.FollowOpen(ticket=ticket_to_wire(ticket))))
    command = await fake.engine.expect(messages.FollowAttach)
    assert command.ticket == ticket
    fake.engine.dispatch(messages.FollowAttached(command.follow, LeaseTerms()))
    attached = (await read_one(call)).attached
    assert (attached.engine_epoch, attached.lease.beat_s) == (fake.engine.epoch, 1.0)
    return call, command.follow


async def test_connect_tells_epoch_layout_and_offers(fake: Fake) -> None:
    response = await stub_of(fake).Connect(pb.ConnectRequest(layouts=[layout_to_wire(LAYOUT)]))
    assert (response.engine_epoch, response.model_fingerprint) == (fake.engine.epoch, b"model")
    assert response.source.address == fake.address
    assert [offer.name for offer in response.offers] == ["grpc"]
    assert list(response.layouts) == [layout_to_wire(LAYOUT)]


async def test_connect_refuses_a_reader_whose_blocks_differ(fake: Fake) -> None:
    other = layout_to_wire(replace(LAYOUT, num_layers=2))
    with pytest.raises(grpc.RpcError) as caught:
        await stub_of(fake).Connect(pb.ConnectRequest(layouts=[other]))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_follow_forwards_ready_and_complete_and_ends_on_release(fake: Fake) -> None:
    call, follow = await attach(fake)
    assert fake.role.heard == [(ATTEMPT, None)]
    fake.engine.dispatch(messages.FollowReady(follow, (2,)))
    partial = GroupBlocks(0, 8, (3,), (103,))
    fake.engine.dispatch(messages.FollowComplete(follow, (FirstToken(0, 0, 42),), (partial,)))
    assert [group.num_blocks for group in (await read_one(call)).ready.groups] == [2]
    complete = (await read_one(call)).complete
    assert (complete.first_tokens[0].token_id, list(complete.partial[0].words)) == (42, [103])
    await call.write(pb.FollowRequest(alive=pb.FollowAlive(pulled_blocks=1)))
    assert (await fake.engine.expect(messages.FollowBeat)).follow == follow
    await call.write(RELEASE)
    assert await fake.engine.expect(messages.FollowRelease) == messages.FollowRelease(
        follow, messages.ReleaseReason.PULLED
    )
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert fake.engine.sent_of(messages.FollowLost) == []
    assert fake.role.heard == [(ATTEMPT, None), (ATTEMPT, FollowEnd.ENDED)]


async def test_a_refused_ticket_stays_with_the_prefill_stream(fake: Fake) -> None:
    call, _ = await attach(fake)
    await call.write(pb.FollowRequest(release=pb.FollowRelease(reason=pb.RELEASE_REASON_REFUSED)))
    command = await fake.engine.expect(messages.FollowRelease)
    assert command.reason is messages.ReleaseReason.REFUSED
    assert fake.role.heard[1:] == [(ATTEMPT, FollowEnd.REFUSED)]


@pytest.mark.parametrize("how", ["cancel", "half-close"])
async def test_a_follow_that_ends_without_release_is_lost_once(fake: Fake, how: str) -> None:
    call, follow = await attach(fake)
    if how == "cancel":
        call.cancel()
    else:
        await call.done_writing()
    assert (await fake.engine.expect(messages.FollowLost)).follow == follow
    await wait_until(lambda: fake.worker.streams.value == 0, "the stream has ended")
    assert len(fake.engine.sent_of(messages.FollowLost)) == 1
    assert fake.role.heard[1:] == [(ATTEMPT, FollowEnd.LOST)]


async def test_the_engine_ends_a_follow_with_the_reason(fake: Fake) -> None:
    call, follow = await attach(fake)
    fake.engine.dispatch(messages.FollowFailed(follow, info_of(LeaseExpiredError("three beats were missed"))))
    assert (await read_one(call)).failed.reason == "LeaseExpiredError"
    assert await call.read() is grpc.aio.EOF
    await wait_until(lambda: fake.worker.streams.value == 0, "the stream has ended")
    assert fake.engine.sent_of(messages.FollowLost) == []
    assert fake.role.heard[1:] == [(ATTEMPT, FollowEnd.ENDED)]


async def test_a_follow_that_another_one_takes_over_does_not_end_the_lease(fake: Fake) -> None:
    first, number = await attach(fake)
    second, _ = await attach(fake)
    fake.engine.dispatch(messages.FollowFailed(number, info_of(SupersededError("another reader follows"))))
    assert (await read_one(first)).failed.reason == "SupersededError"
    assert fake.role.heard == [(ATTEMPT, None)] * 2
    await second.write(RELEASE)
    await fake.engine.expect(messages.FollowRelease)
    assert fake.role.heard[2:] == [(ATTEMPT, FollowEnd.ENDED)]


async def test_a_reader_task_that_breaks_ends_its_stream(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    call, follow = await attach(fake)

    def break_down(stream: FollowStream) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(FollowStream, "beat", break_down)
    await call.write(pb.FollowRequest(alive=pb.FollowAlive()))
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert (await fake.engine.expect(messages.FollowLost)).follow == follow
    assert fake.worker.request_tasks.num_crashed == 1
    fake.worker.request_tasks.num_crashed = 0  # as it should be


async def test_a_rejected_ticket_never_counts_as_followed(fake: Fake) -> None:
    call = stub_of(fake).Follow()
    ticket = make_ticket(fake.engine, fake.address)
    await call.write(pb.FollowRequest(open=pb.FollowOpen(ticket=ticket_to_wire(ticket))))
    await call.write(RELEASE)
    await fake.engine.expect(messages.FollowRelease)
    assert fake.role.heard == []


@pytest.mark.parametrize("first", [RELEASE, pb.FollowRequest(open=pb.FollowOpen())])
async def test_a_malformed_beginning_is_an_invalid_request(fake: Fake, first: pb.FollowRequest) -> None:
    call = stub_of(fake).Follow()
    await call.write(first)
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fake.engine.sent == []


async def test_a_second_open_ends_the_follow_as_invalid(fake: Fake) -> None:
    call, follow = await attach(fake)
    await call.write(pb.FollowRequest(open=pb.FollowOpen()))
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await fake.engine.expect(messages.FollowLost)).follow == follow


async def test_release_by_rpc_answers_what_the_engine_says(fake: Fake) -> None:
    ticket = make_ticket(fake.engine, fake.address)
    request = pb.ReleaseRequest(ticket=ticket_to_wire(ticket), reason=pb.RELEASE_REASON_CANCELLED)

    async def answer(released: bool, error: Any = None) -> None:
        command = await fake.engine.expect(messages.ReleaseTicket)
        assert command.ticket == ticket
        fake.engine.dispatch(messages.Released(command.call, released, error))

    call = stub_of(fake).Release(request)
    await answer(True)
    assert (await call).released
    assert fake.role.heard == [(ticket.attempt, FollowEnd.ENDED)]
    call = stub_of(fake).Release(request)
    await answer(False)
    assert not (await call).released
    call = stub_of(fake).Release(request)
    await answer(False, info_of(TicketRejectedError("forged", cause="mac")))
    with pytest.raises(grpc.RpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
