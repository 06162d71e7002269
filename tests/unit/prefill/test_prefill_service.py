"""PrefillService over a real server, in front of an engine that says what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from prefill_rig import Fake, make_request, open_message, open_session, read_event, say_accepted, say_finished
from worker_rig import make_attempt, make_ticket, read_one, running_worker, wait_until

from kvrelay.v1 import prefill_pb2 as pb
from kvrelay.v1 import prefill_pb2_grpc
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import DrainingError, OverloadedError, WorkerLostError
from kvrelay_core.rpc.status import error_from_detail, error_from_rpc
from kvrelay_engine import messages
from kvrelay_prefill.role import PrefillRole
from kvrelay_worker.follows import FollowEnd
from kvrelay_worker.wire import ticket_to_wire


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[Fake]:
    async with running_worker(PrefillRole) as worker:
        yield worker


async def test_a_session_carries_a_request_from_open_to_finished(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=5))
    command = await fake.engine.expect(messages.Prefill)
    assert command.handoff
    assert command.generation.prompt == (1, 2, 3, 4)
    fake.engine.dispatch(messages.Queued(command.id, 0.5))
    say_accepted(fake, command.id)
    say_finished(fake, command.id)
    assert (await read_event(call, 5)).queued.eta_s == 0.5
    accepted = (await read_event(call, 5)).accepted
    assert accepted.ticket == ticket_to_wire(make_ticket(fake.engine, fake.address))
    finished = (await read_event(call, 5)).finished
    assert (finished.first_tokens[0].token_id, finished.usage.prompt_tokens) == (42, 12)
    await call.done_writing()
    # The router left: its stream was the lease of the ticket.
    assert (await fake.engine.expect(messages.PrefillStreamClosed)).id == command.id


async def test_engine_errors_reach_the_router_typed(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=1))
    command = await fake.engine.expect(messages.Prefill)
    fake.engine.dispatch(messages.RequestFailed(command.id, info_of(OverloadedError("queue is full", eta_s=3))))
    error = error_from_detail((await read_event(call, 1)).failed)
    assert isinstance(error, OverloadedError)
    assert error.metadata == {"eta_s": "3"}
    assert len(fake.role.requests) == 0


@pytest.mark.parametrize("broken", ["no attempt", "no prompt"])
async def test_a_malformed_request_fails_alone(fake: Fake, broken: str) -> None:
    call = await open_session(fake)
    message = open_message(handle=1)
    message.open.request.ClearField("attempt" if broken == "no attempt" else "generation")
    await call.write(message)
    assert (await read_event(call, 1)).failed.reason == "InvalidRequestError"
    await call.write(open_message(handle=2))
    assert (await fake.engine.expect(messages.Prefill)).id == 1


async def test_cancel_aborts_and_the_router_is_told_nothing_more(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=1))
    command = await fake.engine.expect(messages.Prefill)
    await call.write(pb.PrefillServiceSessionRequest(cancel=pb.HandleCancel(handle=1)))
    assert (await fake.engine.expect(messages.Abort)).id == command.id
    say_finished(fake, command.id)
    await call.write(open_message(handle=2, request_id="other"))
    other = await fake.engine.expect(messages.Prefill)
    fake.engine.dispatch(messages.Queued(other.id, 1.0))
    assert (await read_event(call, 2)).queued.eta_s == 1.0


async def test_a_cancel_that_overtakes_its_request_wins(fake: Fake) -> None:
    call = await open_session(fake)
    cancel = pb.HandleCancel(handle=1, attempt=make_attempt())
    await call.write(pb.PrefillServiceSessionRequest(cancel=cancel))
    await call.write(open_message(handle=1))
    assert (await read_event(call, 1)).failed.reason == "RequestCancelledError"
    assert fake.engine.sent_of(messages.Prefill) == []


async def test_a_higher_attempt_supersedes_the_lower_one(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=1, attempt=1))
    first = await fake.engine.expect(messages.Prefill)
    await call.write(open_message(handle=2, attempt=2))
    assert (await fake.engine.expect(messages.Abort)).id == first.id
    assert (await read_event(call, 1)).failed.reason == "SupersededError"
    await call.write(open_message(handle=3, attempt=1))
    assert (await read_event(call, 3)).failed.reason == "SupersededError"


async def test_a_lost_session_aborts_what_nobody_follows_after_the_grace(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=1))
    command = await fake.engine.expect(messages.Prefill)
    call.cancel()
    assert (await fake.engine.expect(messages.Abort)).id == command.id
    assert len(fake.role.requests) == 0


async def test_a_router_that_comes_back_in_time_is_told_again(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=1))
    command = await fake.engine.expect(messages.Prefill)
    say_accepted(fake, command.id)
    await read_event(call, 1)
    call.cancel()
    again = await open_session(fake)
    await again.write(open_message(handle=8))
    assert (await read_event(again, 8)).WhichOneof("event") == "accepted"
    say_finished(fake, command.id)
    assert (await read_event(again, 8)).WhichOneof("event") == "finished"
    # The old session's grace passes without effect on the request.
    await wait_until(lambda: len(fake.role.servicer._receivers) == 1, "the lost session is gone")
    assert fake.engine.sent_of(messages.Abort) == []
    assert fake.engine.sent_of(messages.PrefillStreamClosed) == []
    assert len(fake.engine.sent_of(messages.Prefill)) == 1


async def test_release_by_router_and_by_reader_end_the_hold(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=1, request_id="one"))
    first = await fake.engine.expect(messages.Prefill)
    say_accepted(fake, first.id)
    say_finished(fake, first.id)
    await call.write(pb.PrefillServiceSessionRequest(release=pb.HandleCancel(handle=1)))
    assert (await fake.engine.expect(messages.PrefillStreamClosed)).id == first.id

    await call.write(open_message(handle=2))
    second = await fake.engine.expect(messages.Prefill)
    say_accepted(fake, second.id)
    say_finished(fake, second.id)
    assert len(fake.role.requests) == 1
    fake.role.requests.on_unfollowed(second.attempt, FollowEnd.ENDED)
    # A router whose session was lost just now can still come back for the answer.
    fake.engine.beat()
    assert len(fake.role.requests) == 1
    fake.clock.advance(0.2)
    fake.engine.beat()
    assert len(fake.role.requests) == 0
    call.cancel()


async def test_a_ticket_nobody_came_for_is_forgotten_with_its_lease(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=1))
    command = await fake.engine.expect(messages.Prefill)
    say_accepted(fake, command.id)
    say_finished(fake, command.id)
    fake.clock.advance(29.0)
    fake.engine.beat()
    assert len(fake.role.requests) == 1
    fake.clock.advance(1.6)
    fake.engine.beat()
    assert len(fake.role.requests) == 0
    call.cancel()


async def test_a_single_request_ends_with_finished(fake: Fake) -> None:
    call = prefill_pb2_grpc.PrefillServiceStub(fake.channel).Prefill(make_request())
    command = await fake.engine.expect(messages.Prefill)
    assert fake.worker.streams.value == 1
    say_accepted(fake, command.id)
    say_finished(fake, command.id)
    assert [event.WhichOneof("event") async for event in call] == ["accepted", "finished"]
    assert fake.engine.sent_of(messages.PrefillStreamClosed) == []


async def test_a_single_request_whose_client_goes_away_is_aborted_at_once(fake: Fake) -> None:
    call = prefill_pb2_grpc.PrefillServiceStub(fake.channel).Prefill(make_request())
    command = await fake.engine.expect(messages.Prefill)
    call.cancel()
    assert (await fake.engine.expect(messages.Abort)).id == command.id


async def test_draining_refuses_new_requests_and_lets_the_running_one_end(fake: Fake) -> None:
    call = await open_session(fake)
    await call.write(open_message(handle=1))
    command = await fake.engine.expect(messages.Prefill)
    fake.worker.request_drain(60.0)
    await fake.engine.expect(messages.Drain)
    await call.write(open_message(handle=2, request_id="late"))
    assert (await read_event(call, 2)).failed.reason == "DrainingError"
    say_finished(fake, command.id)
    assert (await read_event(call, 1)).WhichOneof("event") == "finished"
    call.cancel()


async def test_a_lost_engine_fails_every_stream() -> None:
    async with running_worker(PrefillRole) as fake:
        session = await open_session(fake)
        single = prefill_pb2_grpc.PrefillServiceStub(fake.channel).Prefill(make_request())
        await fake.engine.expect(messages.Prefill)
        fake.engine.die()
        assert (await read_one(single)).failed.reason == "WorkerLostError"
        with pytest.raises(grpc.RpcError) as caught:
            await read_one(session)
        assert isinstance(error_from_rpc(caught.value, "prefill"), WorkerLostError)
        with pytest.raises(grpc.RpcError) as caught:
            await read_one(prefill_pb2_grpc.PrefillServiceStub(fake.channel).Prefill(make_request(2)))
        assert isinstance(error_from_rpc(caught.value, "prefill"), WorkerLostError)


async def test_a_session_without_an_engine_to_welcome_it_leaves_nothing() -> None:
    async with running_worker(PrefillRole) as fake:
        fake.engine.die()
        call = prefill_pb2_grpc.PrefillServiceStub(fake.channel).Session()
        await call.write(pb.PrefillServiceSessionRequest(hello=pb.SessionHello(router_id="router")))
        with pytest.raises(grpc.RpcError):
            await read_one(call)
        assert len(fake.role.servicer._sessions) == 0


async def test_a_worker_that_stops_tells_every_stream_at_once() -> None:
    async with running_worker(PrefillRole) as fake:
        call = await open_session(fake)
        await call.write(open_message(handle=1))
        await fake.engine.expect(messages.Prefill)
        stopping = asyncio.ensure_future(fake.server.stop())
        assert (await read_event(call, 1)).failed.reason == "DrainingError"
        with pytest.raises(grpc.RpcError) as caught:
            await read_one(call)
        assert isinstance(error_from_rpc(caught.value, "prefill"), DrainingError)
        await stopping


async def test_a_session_reader_that_breaks_ends_the_session(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(fake.role.requests, "open", break_down)
    call = await open_session(fake)
    await call.write(open_message(handle=1))
    with pytest.raises(grpc.RpcError) as caught:
        await read_one(call)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert fake.worker.tasks.num_crashed == 1
    fake.worker.tasks.num_crashed = 0  # as it should be


async def test_a_session_must_say_hello_first(fake: Fake) -> None:
    call = prefill_pb2_grpc.PrefillServiceStub(fake.channel).Session()
    await call.write(open_message(handle=1))
    with pytest.raises(grpc.RpcError) as caught:
        await read_one(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
