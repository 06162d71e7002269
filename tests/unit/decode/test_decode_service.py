"""DecodeService over a real server, in front of an engine that says what the test says. No hand-off here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from worker_rig import RiggedWorker, make_attempt, make_generation, make_ticket, read_one, running_worker, wait_until

from kvrelay.v1 import common_pb2, decode_pb2_grpc, prefill_pb2
from kvrelay.v1 import decode_pb2 as pb
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import OverloadedError, TransferError, WorkerLostError
from kvrelay_core.request import ChoiceState, FinishReason, TokenLogprobs
from kvrelay_core.rpc.status import error_from_rpc
from kvrelay_decode.role import DecodeRole
from kvrelay_engine import messages
from kvrelay_worker.wire import ticket_to_wire

Fake = RiggedWorker[DecodeRole]


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[Fake]:
    async with running_worker(DecodeRole) as worker:
        yield worker


def make_start(attempt: int = 1, request_id: str = "request", num_choices: int = 1) -> pb.DecodeStart:
    generation = make_generation()
    generation.choices.extend(common_pb2.ChoiceState(index=index) for index in range(num_choices))
    return pb.DecodeStart(attempt=make_attempt(attempt, request_id), generation=generation)


async def open_session(fake: Fake) -> Any:
    call = decode_pb2_grpc.DecodeServiceStub(fake.channel).Session()
    hello = prefill_pb2.SessionHello(router_id="router")
    await call.write(pb.DecodeServiceSessionRequest(hello=hello))
    assert (await read_one(call)).welcome.worker_id == "decode-0"
    return call


async def open_request(fake: Fake, call: Any, handle: int, start: pb.DecodeStart | None = None) -> int:
    """Returns the request's id in the engine."""
    message = pb.DecodeOpen(handle=handle, start=start or make_start())
    await call.write(pb.DecodeServiceSessionRequest(open=message))
    return (await fake.engine.expect(messages.Decode)).id


def say_tokens(fake: Fake, *rows: tuple[int, int, int, int], logprobs: Any = ()) -> None:
    """Rows of (id, choice, position, token)."""
    ids, choices, positions, tokens = zip(*rows, strict=True)
    fake.engine.dispatch(messages.StepTokens(ids, choices, positions, tokens, logprobs))


def say_finished(fake: Fake, request_id: int, choice: int = 0, num_tokens: int = 2) -> None:
    fake.engine.dispatch(messages.ChoiceFinished(request_id, choice, FinishReason.LENGTH, num_tokens))


async def read_rows(call: Any) -> list[tuple[int, int, int, int]]:
    """The next message's rows of (handle, choice, position, token)."""
    tokens = (await read_one(call)).tokens
    return list(zip(tokens.handles, tokens.choices, tokens.positions, tokens.token_ids, strict=True))


async def read_event(call: Any, handle: int) -> pb.DecodeEvent:
    message = await read_one(call)
    assert (message.WhichOneof("message"), message.event.handle) == ("event", handle)
    event: pb.DecodeEvent = message.event.event
    return event


async def test_one_engine_step_is_one_message_per_session(fake: Fake) -> None:
    first, second = await open_session(fake), await open_session(fake)
    a = await open_request(fake, first, 7, make_start(request_id="a"))
    b = await open_request(fake, first, 8, make_start(request_id="b"))
    c = await open_request(fake, second, 7, make_start(request_id="c"))
    say_tokens(fake, (a, 0, 0, 10), (c, 0, 5, 30), (b, 0, 2, 20), (999, 0, 0, 1))
    assert await read_rows(first) == [(7, 0, 0, 10), (8, 0, 2, 20)]
    assert await read_rows(second) == [(7, 0, 5, 30)]
    for request_id in (a, b, c):
        say_finished(fake, request_id)
    assert (await read_event(first, 7)).finished.num_tokens == 2
    assert (await read_event(first, 8)).finished.reason == common_pb2.FINISH_REASON_LENGTH
    first.cancel(), second.cancel()


async def test_logprobs_travel_beside_their_tokens(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1)
    logprobs = (TokenLogprobs(-1.5, ((4, -1.5), (5, -2.5))),)
    say_tokens(fake, (request_id, 0, 0, 4), logprobs=logprobs)
    entry = (await read_one(call)).tokens.logprobs[0]
    assert (entry.logprob, [top.token_id for top in entry.top]) == (-1.5, [4, 5])
    call.cancel()
    await fake.engine.expect(messages.Abort)


async def test_a_lost_session_is_resumed_from_the_last_position_while_decode_goes_on(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1)
    say_tokens(fake, (request_id, 0, 0, 10))
    say_tokens(fake, (request_id, 0, 1, 11))
    assert await read_rows(call) == [(1, 0, 0, 10)]
    call.cancel()
    await wait_until(lambda: len(fake.role.servicer._sessions) == 0, "the loss is noticed")
    say_tokens(fake, (request_id, 0, 2, 12))
    again = await open_session(fake)
    reattach = pb.DecodeReattach(handle=4, attempt=make_attempt(), next_positions={0: 1})
    await again.write(pb.DecodeServiceSessionRequest(reattach=reattach))
    assert await read_rows(again) == [(4, 0, 1, 11), (4, 0, 2, 12)]
    say_tokens(fake, (request_id, 0, 3, 13))
    assert await read_rows(again) == [(4, 0, 3, 13)]
    await wait_until(lambda: len(fake.role.servicer._receivers) == 1, "the old session's grace is over")
    assert fake.engine.sent_of(messages.Abort) == []
    say_finished(fake, request_id, num_tokens=4)
    assert (await read_event(again, 4)).finished.num_tokens == 4
    again.cancel()


def abort_of(handle: int, *choices: int) -> pb.DecodeServiceSessionRequest:
    message = pb.DecodeAbortChoicesHandle(handle=handle, abort_choices=pb.DecodeAbortChoices(choices=choices))
    return pb.DecodeServiceSessionRequest(abort_choices=message)


async def test_aborted_choices_end_and_the_others_go_on(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1, make_start(num_choices=3))
    for choices in ((0, 2), (2,), (), (7,)):  # the later ones change nothing
        await call.write(abort_of(1, *choices))
    await call.write(abort_of(99, 0))  # of no request
    assert (await fake.engine.expect(messages.Abort)).choices == (0, 2)
    say_tokens(fake, (request_id, 0, 0, 10), (request_id, 1, 0, 20), (request_id, 2, 0, 30))
    assert await read_rows(call) == [(1, 1, 0, 20)]
    say_finished(fake, request_id, choice=2)  # had ended before it heard
    say_finished(fake, request_id, choice=1)
    assert (await read_event(call, 1)).finished.choice == 1
    assert fake.worker.num_live_requests == 0
    assert len(fake.engine.sent_of(messages.Abort)) == 1
    call.cancel()


async def test_when_the_last_choice_is_aborted_the_request_is_over(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1, make_start(num_choices=3))
    await call.write(abort_of(1, 1))
    assert await fake.engine.expect(messages.Abort) == messages.Abort(request_id, "aborted by the router", (1,))
    say_finished(fake, request_id, choice=2)
    assert (await read_event(call, 1)).finished.choice == 2
    await call.write(abort_of(1, 0))
    assert await fake.engine.expect(messages.Abort) == messages.Abort(request_id, "aborted by the router")
    assert len(fake.role.requests) == 0
    call.cancel()


async def test_a_refused_attempt_may_be_offered_again_and_is_tried_anew(fake: Fake) -> None:
    call = await open_session(fake)
    refused = await open_request(fake, call, 1)
    fake.engine.dispatch(messages.RequestFailed(refused, info_of(OverloadedError("no room"))))
    assert (await read_event(call, 1)).failed.reason == "OverloadedError"
    again = await open_request(fake, call, 2)  # the same attempt, perhaps with the same ticket
    assert again != refused
    say_tokens(fake, (again, 0, 0, 10))
    assert await read_rows(call) == [(2, 0, 0, 10)]
    fake.engine.dispatch(messages.RequestFailed(again, info_of(OverloadedError("preempted"))))
    assert (await read_event(call, 2)).failed.reason == "OverloadedError"
    await call.write(pb.DecodeServiceSessionRequest(open=pb.DecodeOpen(handle=3, start=make_start())))
    assert await read_rows(call) == [(3, 0, 0, 10)], "it had begun: whoever comes again gets what there was"
    call.cancel()


async def test_the_end_of_a_request_is_told_again_within_the_grace(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1, make_start(num_choices=2))
    say_tokens(fake, (request_id, 0, 0, 10), (request_id, 1, 0, 20))
    say_finished(fake, request_id, choice=0, num_tokens=1)
    assert fake.worker.num_live_requests == 1
    say_finished(fake, request_id, choice=1, num_tokens=1)
    assert fake.worker.num_live_requests == 0
    reattach = pb.DecodeReattach(handle=2, attempt=make_attempt(), next_positions={0: 1, 1: 0})
    again = await open_session(fake)
    await again.write(pb.DecodeServiceSessionRequest(reattach=reattach))
    assert await read_rows(again) == [(2, 1, 0, 20)]
    assert [(await read_event(again, 2)).finished.choice for _ in range(2)] == [0, 1]
    fake.clock.advance(0.2)
    fake.engine.beat()
    assert len(fake.role.requests) == 0
    await again.write(pb.DecodeServiceSessionRequest(reattach=reattach))
    assert (await read_event(again, 2)).failed.reason == "SupersededError"
    call.cancel(), again.cancel()


async def test_reattaching_to_what_never_ran_here_is_typed(fake: Fake) -> None:
    call = await open_session(fake)
    reattach = pb.DecodeReattach(handle=2, attempt=make_attempt())
    await call.write(pb.DecodeServiceSessionRequest(reattach=reattach))
    assert (await read_event(call, 2)).failed.reason == "UnavailableError"
    call.cancel()


async def test_a_session_that_stays_away_has_its_requests_aborted(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1)
    call.cancel()
    assert (await fake.engine.expect(messages.Abort)).id == request_id
    assert len(fake.role.requests) == 0


async def test_a_lost_handoff_waits_for_resume_as_a_higher_attempt(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1)
    lost = messages.HandoffLost(request_id, 2, 8, info_of(TransferError("the source is gone")))
    fake.engine.dispatch(lost)
    event = (await read_event(call, 1)).handoff_lost
    assert (event.verified_blocks, event.verified_tokens, event.cause.reason) == (2, 8, "TransferError")
    choices = [common_pb2.ChoiceState(index=0, committed_token_ids=[10])]
    resume = pb.DecodeResumeHandle(handle=1, resume=pb.DecodeResume(attempt=make_attempt(2), choices=choices))
    for _ in range(2):  # the second one changes nothing
        await call.write(pb.DecodeServiceSessionRequest(resume=resume))
    command = await fake.engine.expect(messages.Resume)
    assert command == messages.Resume(request_id, (ChoiceState(0, (10,)),))
    say_tokens(fake, (request_id, 0, 1, 11))
    assert await read_rows(call) == [(1, 0, 1, 11)]
    assert len(fake.engine.sent_of(messages.Resume)) == 1
    await call.write(pb.DecodeServiceSessionRequest(open=pb.DecodeOpen(handle=2, start=make_start(1))))
    assert (await read_event(call, 2)).failed.reason == "SupersededError"
    say_finished(fake, request_id)
    call.cancel()


async def test_resume_without_a_lost_handoff_fails_the_request(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1)
    resume = pb.DecodeResumeHandle(handle=1, resume=pb.DecodeResume(attempt=make_attempt(2)))
    await call.write(pb.DecodeServiceSessionRequest(resume=resume))
    assert (await read_event(call, 1)).failed.reason == "InvalidRequestError"
    assert (await fake.engine.expect(messages.Abort)).id == request_id
    call.cancel()


async def test_abort_by_handle_and_before_its_request(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1)
    await call.write(pb.DecodeServiceSessionRequest(abort=pb.DecodeAbortHandle(handle=1, reason="enough")))
    assert await fake.engine.expect(messages.Abort) == messages.Abort(request_id, "enough")
    early = pb.DecodeAbortHandle(handle=2, attempt=make_attempt(request_id="early"))
    await call.write(pb.DecodeServiceSessionRequest(abort=early))
    open_early = pb.DecodeOpen(handle=2, start=make_start(request_id="early"))
    await call.write(pb.DecodeServiceSessionRequest(open=open_early))
    assert (await read_event(call, 2)).failed.reason == "RequestCancelledError"
    call.cancel()


async def test_a_higher_attempt_supersedes_and_the_lower_is_told(fake: Fake) -> None:
    call = await open_session(fake)
    first = await open_request(fake, call, 1)
    second = await open_request(fake, call, 2, make_start(2))
    assert (await fake.engine.expect(messages.Abort)).id == first
    assert (await read_event(call, 1)).failed.reason == "SupersededError"
    say_finished(fake, second)
    assert (await read_event(call, 2)).WhichOneof("event") == "finished"
    call.cancel()


async def test_a_handle_in_use_is_refused_and_the_first_request_goes_on(fake: Fake) -> None:
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1)
    other = pb.DecodeOpen(handle=1, start=make_start(request_id="other"))
    await call.write(pb.DecodeServiceSessionRequest(open=other))
    assert (await read_event(call, 1)).failed.reason == "SupersededError"
    say_tokens(fake, (request_id, 0, 0, 10))
    assert await read_rows(call) == [(1, 0, 0, 10)]
    call.cancel()


async def test_handed_back_and_failed_end_the_request(fake: Fake) -> None:
    call = await open_session(fake)
    a = await open_request(fake, call, 1, make_start(request_id="a"))
    b = await open_request(fake, call, 2, make_start(request_id="b"))
    fake.engine.dispatch(messages.HandedBack(a, info_of(OverloadedError("preempted"))))
    fake.engine.dispatch(messages.RequestFailed(b, info_of(OverloadedError("no room", needed=4))))
    assert (await read_event(call, 1)).handed_back.cause.reason == "OverloadedError"
    assert dict((await read_event(call, 2)).failed.metadata) == {"needed": "4"}
    assert fake.worker.num_live_requests == 0
    call.cancel()


async def test_a_router_too_far_behind_is_lost_with_a_typed_error(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.role.servicer._sessions, "_limit", 3)
    call = await open_session(fake)
    request_id = await open_request(fake, call, 1)
    for position in range(5):  # in one go: the writer has no turn in between
        say_tokens(fake, (request_id, 0, position, 10))
    with pytest.raises(grpc.RpcError) as caught:
        await read_one(call)
    assert isinstance(error_from_rpc(caught.value, "decode"), OverloadedError)
    assert (await fake.engine.expect(messages.Abort)).id == request_id


async def test_a_ticket_of_an_unregistered_source_is_refused(fake: Fake) -> None:
    call = await open_session(fake)
    start = make_start()
    start.ticket.CopyFrom(ticket_to_wire(make_ticket(fake.engine, "10.0.0.1:80")))
    await call.write(pb.DecodeServiceSessionRequest(open=pb.DecodeOpen(handle=1, start=start)))
    assert (await read_event(call, 1)).failed.reason == "TicketRejectedError"
    start.ticket.ClearField("engine_epoch")
    await call.write(pb.DecodeServiceSessionRequest(open=pb.DecodeOpen(handle=2, start=start)))
    assert (await read_event(call, 2)).failed.reason == "InvalidRequestError"
    assert fake.engine.sent == []
    call.cancel()


# ------------------------------------------------------------------------------------------- single requests


async def start_single(fake: Fake) -> tuple[Any, int]:
    call = decode_pb2_grpc.DecodeServiceStub(fake.channel).Decode()
    await call.write(pb.DecodeRequest(start=make_start()))
    return call, (await fake.engine.expect(messages.Decode)).id


async def test_a_single_request_streams_until_its_last_choice(fake: Fake) -> None:
    call, request_id = await start_single(fake)
    await call.done_writing()
    say_tokens(fake, (request_id, 0, 0, 10))
    assert await read_rows(call) == [(0, 0, 0, 10)]
    say_finished(fake, request_id)
    assert (await read_one(call)).event.finished.num_tokens == 2
    assert await call.read() is grpc.aio.EOF
    await wait_until(lambda: len(fake.role.requests) == 0, "the request is forgotten with its stream")
    assert fake.engine.sent_of(messages.Abort) == []


@pytest.mark.parametrize("how", ["cancel", "abort"])
async def test_a_single_request_ends_with_its_client(fake: Fake, how: str) -> None:
    call, request_id = await start_single(fake)
    if how == "cancel":
        call.cancel()
    else:
        await call.write(pb.DecodeRequest(abort=pb.DecodeAbort(reason="enough")))
        assert await call.read() is grpc.aio.EOF
    assert (await fake.engine.expect(messages.Abort)).id == request_id


async def test_a_single_request_resumes_after_a_lost_handoff(fake: Fake) -> None:
    call, request_id = await start_single(fake)
    fake.engine.dispatch(messages.HandoffLost(request_id, 0, 0, info_of(TransferError("gone"))))
    assert (await read_one(call)).event.WhichOneof("event") == "handoff_lost"
    choices = [common_pb2.ChoiceState(index=0, committed_token_ids=[10])]
    await call.write(pb.DecodeRequest(resume=pb.DecodeResume(attempt=make_attempt(2), choices=choices)))
    assert (await fake.engine.expect(messages.Resume)).id == request_id
    say_finished(fake, request_id)
    assert (await read_one(call)).event.WhichOneof("event") == "finished"
    assert await call.read() is grpc.aio.EOF


async def test_a_second_start_is_invalid_and_aborts(fake: Fake) -> None:
    call, request_id = await start_single(fake)
    await call.write(pb.DecodeRequest(start=make_start()))
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await fake.engine.expect(messages.Abort)).id == request_id


async def test_draining_refuses_new_requests(fake: Fake) -> None:
    call, request_id = await start_single(fake)
    fake.worker.request_drain(60.0)
    late = decode_pb2_grpc.DecodeServiceStub(fake.channel).Decode()
    await late.write(pb.DecodeRequest(start=make_start(request_id="late")))
    with pytest.raises(grpc.RpcError) as caught:
        await late.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    say_finished(fake, request_id)
    assert (await read_one(call)).event.WhichOneof("event") == "finished"


async def test_a_lost_engine_fails_every_request_and_stream() -> None:
    async with running_worker(DecodeRole) as fake:
        session = await open_session(fake)
        await open_request(fake, session, 1, make_start(request_id="other"))
        single, _ = await start_single(fake)
        fake.engine.die()
        assert (await read_one(single)).event.failed.reason == "WorkerLostError"
        assert (await read_event(session, 1)).failed.reason == "WorkerLostError"
        with pytest.raises(grpc.RpcError) as caught:
            await read_one(session)
        assert isinstance(error_from_rpc(caught.value, "decode"), WorkerLostError)
        assert len(fake.role.requests) == 0
