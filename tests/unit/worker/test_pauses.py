"""A pause of 1.5 s, of either side, fails no stream: it is opened again within its grace (PROTOCOL B3).

The transport gives a silent peer up after 0.9 s. Held up in between, both sides see the other one stop; with the
default graces, and nothing is said twice to the engines or lost on the way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from cuttable_proxy import CuttableProxy, cuttable_proxy
from msgspec.structs import fields
from prefill_rig import open_message, open_session, read_event, say_accepted, say_finished
from worker_rig import RiggedWorker, make_attempt, make_generation, make_ticket, read_one, running_worker

from kvrelay.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2
from kvrelay_core.request import FinishReason
from kvrelay_core.rpc.channel import open_channel
from kvrelay_decode.role import DecodeRole
from kvrelay_engine import messages
from kvrelay_engine.messages import ReleaseReason
from kvrelay_prefill.role import PrefillRole
from kvrelay_transfer.ticket import KvTicket, LeaseTerms
from kvrelay_worker.config import WorkerConfig
from kvrelay_worker.peer_errors import RETRY_PAUSE_S
from kvrelay_worker.wire import ticket_to_wire

PAUSE_S = 1.5
GRACES: dict[str, Any] = {
    field.name: field.default for field in fields(WorkerConfig) if field.name in ("session_grace_s", "follow_grace_s")
}
PAUSES: dict[str, Callable[[CuttableProxy], None]] = {
    "stands still": CuttableProxy.hold,
    "is away": lambda proxy: proxy.cut(refuse=True),
}


async def pause(proxy: CuttableProxy, how: str) -> None:
    PAUSES[how](proxy)
    await asyncio.sleep(PAUSE_S)
    proxy.mend()


async def patiently(open_call: Callable[[], Awaitable[Any]]) -> Any:
    """As routers do it: a call may still be put on the connection that is just dying."""
    while True:
        try:
            return await open_call()
        except grpc.RpcError:
            await asyncio.sleep(RETRY_PAUSE_S)


@asynccontextmanager
async def source_behind_proxy() -> AsyncIterator[tuple[RiggedWorker[PrefillRole], CuttableProxy]]:
    async with running_worker(PrefillRole, **GRACES) as source, cuttable_proxy(source.address) as proxy:
        yield source, proxy


async def open_decode(reader: RiggedWorker[DecodeRole], ticket: KvTicket) -> tuple[Any, int]:
    call = decode_pb2_grpc.DecodeServiceStub(reader.channel).Decode()
    start = decode_pb2.DecodeStart(
        attempt=make_attempt(), generation=make_generation(12), ticket=ticket_to_wire(ticket)
    )
    await call.write(decode_pb2.DecodeRequest(start=start))
    return call, (await reader.engine.expect(messages.Decode)).id


@pytest.mark.parametrize("how", PAUSES)
async def test_a_follow(how: str) -> None:
    async with source_behind_proxy() as (source, proxy), running_worker(DecodeRole, **GRACES) as reader:
        ticket = make_ticket(source.engine, proxy.address)
        call, request_id = await open_decode(reader, ticket)
        first = await source.engine.expect(messages.FollowAttach)
        source.engine.dispatch(messages.FollowAttached(first.follow, ticket.lease))
        source.engine.dispatch(messages.FollowReady(first.follow, (1,)))
        await reader.engine.expect(messages.HandoffReady)
        pausing = asyncio.ensure_future(pause(proxy, how))
        assert (await source.engine.expect(messages.FollowLost)).follow == first.follow
        lost_s = time.monotonic()
        again = await source.engine.expect(messages.FollowAttach)
        assert time.monotonic() - lost_s < LeaseTerms().lost_grace_s
        source.engine.dispatch(messages.FollowAttached(again.follow, ticket.lease))
        source.engine.dispatch(messages.FollowReady(again.follow, (3,)))
        assert (await reader.engine.expect(messages.HandoffReady)).num_blocks == (3,)
        reader.engine.dispatch(messages.HandoffRelease(request_id, ReleaseReason.PULLED))
        assert (await source.engine.expect(messages.FollowRelease)).follow == again.follow
        assert reader.engine.sent_of(messages.HandoffFailed) == []
        assert reader.engine.sent_of(messages.DisconnectPeer) == []
        call.cancel()
        await pausing


@pytest.mark.parametrize("how", PAUSES)
async def test_a_fetch(how: str) -> None:
    async with source_behind_proxy() as (source, proxy), running_worker(DecodeRole, **GRACES) as reader:
        ticket = make_ticket(source.engine, proxy.address, num_blocks=2)
        await reader.role.peers.connect(ticket)
        blocks = ticket.groups[0].blocks
        reader.engine.dispatch(messages.Fetch(1, proxy.address, ticket, 0, blocks))
        first = await source.engine.expect(messages.Export)
        pausing = asyncio.ensure_future(pause(proxy, how))
        await asyncio.sleep(0)
        again = await source.engine.expect(messages.Export)
        for export in (first, again):
            source.engine.dispatch(messages.Exported(export.export, ticket.groups[0].words))
        piece = await reader.engine.expect(messages.FetchedPiece)
        assert piece.words == ticket.groups[0].words
        reader.engine.dispatch(messages.SlotFree(piece.slot))
        assert (await reader.engine.expect(messages.FetchEnded)).error is None
        await pausing


@pytest.mark.parametrize("how", PAUSES)
async def test_a_session_with_prefill(how: str) -> None:
    async with source_behind_proxy() as (source, proxy), open_channel(proxy.address) as channel:
        call = await open_session(source, channel)
        await call.write(open_message(handle=1))
        command = await source.engine.expect(messages.Prefill)
        pausing = asyncio.ensure_future(pause(proxy, how))
        await asyncio.sleep(0)
        say_accepted(source, command.id)
        with pytest.raises(grpc.RpcError):
            await read_one(call)
        say_finished(source, command.id)
        again = await patiently(lambda: open_session(source, channel))
        await again.write(open_message(handle=2))
        assert [(await read_event(again, 2)).WhichOneof("event") for _ in range(2)] == ["accepted", "finished"]
        await pausing
        assert source.engine.sent_of(messages.Abort) == []
        assert source.engine.sent_of(messages.PrefillStreamClosed) == []
        again.cancel()


@pytest.mark.parametrize("how", PAUSES)
async def test_a_session_with_decode(how: str) -> None:
    async with running_worker(DecodeRole, **GRACES) as worker, cuttable_proxy(worker.address) as proxy:
        async with open_channel(proxy.address) as channel:
            call = await open_decode_session(channel)
            start = decode_pb2.DecodeStart(attempt=make_attempt(), generation=make_generation())
            message = decode_pb2.DecodeOpen(handle=1, start=start)
            await call.write(decode_pb2.DecodeServiceSessionRequest(open=message))
            request_id = (await worker.engine.expect(messages.Decode)).id
            worker.engine.dispatch(messages.StepTokens((request_id,), (0,), (0,), (10,)))
            assert list((await read_one(call)).tokens.token_ids) == [10]
            pausing = asyncio.ensure_future(pause(proxy, how))
            await asyncio.sleep(0)
            worker.engine.dispatch(messages.StepTokens((request_id,), (0,), (1,), (11,)))
            with pytest.raises(grpc.RpcError):
                await read_one(call)
            again = await patiently(lambda: open_decode_session(channel))
            reattach = decode_pb2.DecodeReattach(handle=1, attempt=make_attempt(), next_positions={0: 1})
            await again.write(decode_pb2.DecodeServiceSessionRequest(reattach=reattach))
            assert list((await read_one(again)).tokens.token_ids) == [11]
            worker.engine.dispatch(messages.ChoiceFinished(request_id, 0, FinishReason.LENGTH, 2))
            assert (await read_one(again)).event.event.finished.num_tokens == 2
            await pausing
            assert worker.engine.sent_of(messages.Abort) == []
            again.cancel()


async def open_decode_session(channel: grpc.aio.Channel) -> Any:
    call = decode_pb2_grpc.DecodeServiceStub(channel).Session(wait_for_ready=True)
    hello = prefill_pb2.SessionHello(router_id="router")
    await call.write(decode_pb2.DecodeServiceSessionRequest(hello=hello))
    assert (await read_one(call)).HasField("welcome")
    return call
