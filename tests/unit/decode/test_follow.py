"""The Follow stream of a hand-off between a real decode and a real prefill service, with fake engines on both sides.

What a test says for the engines, it says out of their mouths: `source` is prefill's, `reader` is decode's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from cuttable_proxy import CuttableProxy, cuttable_proxy
from msgspec.structs import replace
from worker_rig import RiggedWorker, make_attempt, make_generation, make_ticket, read_one, running_worker, wait_until

from kvrelay.v1 import decode_pb2 as pb
from kvrelay.v1 import decode_pb2_grpc, kv_source_pb2_grpc, prefill_pb2
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import (
    DrainingError,
    LeaseExpiredError,
    MismatchError,
    PoolExhaustedError,
    RequestCancelledError,
    TransferError,
)
from kvrelay_core.request import FinishReason, FirstToken, HandoffTiming
from kvrelay_core.rpc.channel import open_channel
from kvrelay_decode.follow import HandoffFollow
from kvrelay_decode.role import DecodeRole
from kvrelay_engine import messages
from kvrelay_engine.messages import ReleaseReason
from kvrelay_prefill.role import PrefillRole
from kvrelay_transfer.ticket import GroupBlocks, KvTicket
from kvrelay_worker.peers import PeerBook
from kvrelay_worker.wire import ticket_to_wire


@dataclass
class Relay:
    source: RiggedWorker[PrefillRole]
    reader: RiggedWorker[DecodeRole]
    proxy: CuttableProxy
    ticket: KvTicket
    call: Any = None  # the client's Decode call
    id: int = 0  # the request in the reader's engine
    follow: int = 0  # its Follow in the source's engine

    async def open(self) -> None:
        self.call = decode_pb2_grpc.DecodeServiceStub(self.reader.channel).Decode()
        ticket = ticket_to_wire(self.ticket)
        start = pb.DecodeStart(attempt=make_attempt(), generation=make_generation(12), ticket=ticket)
        await self.call.write(pb.DecodeRequest(start=start))
        self.id = (await self.reader.engine.expect(messages.Decode)).id

    async def attach(self) -> None:
        command = await self.source.engine.expect(messages.FollowAttach)
        assert command.ticket == self.ticket
        self.follow = command.follow
        self.source.engine.dispatch(messages.FollowAttached(self.follow, self.ticket.lease))

    async def arrive(self) -> None:
        """The reader's engine has pulled everything; the request ends after its first token."""
        self.reader.engine.dispatch(messages.HandoffRelease(self.id, ReleaseReason.PULLED))
        assert (await self.source.engine.expect(messages.FollowRelease)).reason is ReleaseReason.PULLED
        self.reader.engine.dispatch(messages.HandoffDone(self.id, HandoffTiming(1024, 0.1, 3, 0, "grpc")))
        assert (await read_one(self.call)).event.accepted.handoff.blocks_pulled == 3
        self.reader.engine.dispatch(messages.ChoiceFinished(self.id, 0, FinishReason.LENGTH, 1))
        assert (await read_one(self.call)).event.WhichOneof("event") == "finished"


@asynccontextmanager
async def relay(**changes: Any) -> AsyncIterator[Relay]:
    async with running_worker(PrefillRole, **changes) as source, cuttable_proxy(source.address) as proxy:
        async with running_worker(DecodeRole, **changes) as reader:
            yield Relay(source, reader, proxy, make_ticket(source.engine, proxy.address))


async def test_ready_and_complete_reach_the_engine_and_pulled_reaches_the_source() -> None:
    async with relay() as it:
        await it.open()
        await it.attach()
        it.source.engine.dispatch(messages.FollowReady(it.follow, (2,)))
        assert await it.reader.engine.expect(messages.HandoffReady) == messages.HandoffReady(it.id, (2,))
        assert len(it.reader.engine.sent_of(messages.ConnectPeer)) == 1
        tokens, partial = (FirstToken(0, 0, 42),), (GroupBlocks(0, 8, (3,), (103,)),)
        it.source.engine.dispatch(messages.FollowComplete(it.follow, tokens, partial))
        assert await it.reader.engine.expect(messages.HandoffComplete) == messages.HandoffComplete(
            it.id, tokens, partial
        )
        await it.arrive()
        await wait_until(lambda: it.source.worker.streams.value == 0, "the Follow has ended")
        assert it.source.engine.sent_of(messages.FollowLost) == []
        assert it.reader.engine.sent_of(messages.HandoffFailed) == []


async def test_the_source_hears_a_beat_for_every_beat_of_the_engine_and_no_other() -> None:
    async with relay() as it:
        await it.open()
        await it.attach()
        it.source.engine.dispatch(messages.FollowReady(it.follow, (1,)))
        await it.reader.engine.expect(messages.HandoffReady)
        # A hung engine: messages pass, time passes, and the source hears nothing.
        it.reader.clock.advance(60.0)
        it.source.engine.dispatch(messages.FollowReady(it.follow, (2,)))
        await it.reader.engine.expect(messages.HandoffReady)
        assert it.source.engine.sent_of(messages.FollowBeat) == []
        for _ in range(2):
            it.reader.engine.beat(r1=1)
            assert (await it.source.engine.expect(messages.FollowBeat)).follow == it.follow
        await it.arrive()
        assert len(it.source.engine.sent_of(messages.FollowBeat)) == 2


async def test_a_failure_at_the_source_reaches_the_engine_typed() -> None:
    async with relay() as it:
        await it.open()
        await it.attach()
        it.source.engine.dispatch(messages.FollowFailed(it.follow, info_of(LeaseExpiredError("too late"))))
        failed = await it.reader.engine.expect(messages.HandoffFailed)
        assert (failed.id, failed.error.reason) == (it.id, "LeaseExpiredError")
        # Then the engine gives up the hand-off; the router resumes or aborts.
        it.reader.engine.dispatch(messages.HandoffRelease(it.id, ReleaseReason.FAILED))
        it.reader.engine.dispatch(messages.HandoffLost(it.id, 1, 4, failed.error))
        assert (await read_one(it.call)).event.handoff_lost.verified_tokens == 4
        it.call.cancel()
        assert (await it.reader.engine.expect(messages.Abort)).id == it.id


async def test_a_lost_transport_is_followed_again_within_the_grace() -> None:
    async with relay(follow_grace_s=5.0) as it:
        await it.open()
        await it.attach()
        first = it.follow
        it.source.engine.dispatch(messages.FollowReady(first, (1,)))
        await it.reader.engine.expect(messages.HandoffReady)
        it.proxy.cut()
        assert (await it.source.engine.expect(messages.FollowLost)).follow == first
        await it.attach()
        assert it.follow != first
        it.source.engine.dispatch(messages.FollowReady(it.follow, (2,)))
        assert (await it.reader.engine.expect(messages.HandoffReady)).num_blocks == (2,)
        await it.arrive()
        assert it.reader.engine.sent_of(messages.HandoffFailed) == []
        assert it.reader.engine.sent_of(messages.DisconnectPeer) == []


async def test_a_source_that_stays_away_fails_the_handoff_and_is_disconnected() -> None:
    async with relay(follow_grace_s=0.2) as it:
        await it.open()
        await it.attach()
        it.source.engine.dispatch(messages.FollowReady(it.follow, (1,)))
        await it.reader.engine.expect(messages.HandoffReady)
        it.proxy.cut(refuse=True)
        failed = await it.reader.engine.expect(messages.HandoffFailed)
        assert failed.error.reason == "WorkerLostError"
        assert (await it.reader.engine.expect(messages.DisconnectPeer)).peer_id == it.proxy.address
        it.call.cancel()
        await it.reader.engine.expect(messages.Abort)


async def test_a_source_that_restarted_rejects_the_handoff() -> None:
    async with relay() as it:
        it.ticket = replace(it.ticket, engine_epoch=b"x" * 16)
        await it.open()
        assert (await it.reader.engine.expect(messages.HandoffFailed)).error.reason == "TicketRejectedError"
        assert it.source.engine.sent_of(messages.FollowAttach) == []
        it.call.cancel()
        await it.reader.engine.expect(messages.Abort)


async def test_an_abort_gives_the_pins_back_at_once() -> None:
    async with relay() as it:
        await it.open()
        await it.attach()
        await it.call.write(pb.DecodeRequest(abort=pb.DecodeAbort(reason="enough")))
        assert (await it.reader.engine.expect(messages.Abort)).reason == "enough"
        assert (await it.source.engine.expect(messages.FollowRelease)).reason is ReleaseReason.CANCELLED


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PoolExhaustedError("no room"), ReleaseReason.REFUSED),
        (DrainingError("ending"), ReleaseReason.REFUSED),
        (TransferError("broken"), ReleaseReason.FAILED),
        (MismatchError("other tokens"), ReleaseReason.FAILED),
        (RequestCancelledError("enough"), ReleaseReason.CANCELLED),
    ],
)
async def test_a_failed_request_lets_go_of_its_source(error: Any, reason: ReleaseReason) -> None:
    async with relay() as it:
        await it.open()
        await it.attach()
        it.reader.engine.dispatch(messages.RequestFailed(it.id, info_of(error)))
        assert (await it.source.engine.expect(messages.FollowRelease)).reason is reason
        assert (await read_one(it.call)).event.failed.reason == type(error).__name__


@pytest.mark.parametrize("how", ["engine lost", "stopped"])
async def test_a_worker_that_ends_gives_its_tickets_back_for_another_one(how: str) -> None:
    async with relay() as it:
        await it.open()
        await it.attach()
        if how == "engine lost":
            it.reader.engine.die()
        await it.reader.server.stop()
        assert (await it.source.engine.expect(messages.FollowRelease)).reason is ReleaseReason.REFUSED
        assert it.source.engine.sent_of(messages.FollowLost) == []


async def test_a_superseded_attempt_frees_its_ticket() -> None:
    async with relay() as it:
        await it.open()
        await it.attach()
        other = decode_pb2_grpc.DecodeServiceStub(it.reader.channel).Decode()
        start = pb.DecodeStart(attempt=make_attempt(2), generation=make_generation(12))
        await other.write(pb.DecodeRequest(start=start))
        assert (await it.source.engine.expect(messages.FollowRelease)).reason is ReleaseReason.CANCELLED
        assert (await read_one(it.call)).event.failed.reason == "SupersededError"
        other.cancel()


async def test_a_request_that_ends_before_everything_was_pulled_leaves_no_follow() -> None:
    async with relay() as it:
        session = decode_pb2_grpc.DecodeServiceStub(it.reader.channel).Session()
        await session.write(pb.DecodeServiceSessionRequest(hello=prefill_pb2.SessionHello(router_id="router")))
        start = pb.DecodeStart(attempt=make_attempt(), generation=make_generation(12), ticket=ticket_to_wire(it.ticket))
        await session.write(pb.DecodeServiceSessionRequest(open=pb.DecodeOpen(handle=1, start=start)))
        request_id = (await it.reader.engine.expect(messages.Decode)).id
        await it.attach()
        it.reader.engine.dispatch(messages.HandedBack(request_id, info_of(PoolExhaustedError("preempted"))))
        assert (await it.source.engine.expect(messages.FollowRelease)).reason is ReleaseReason.CANCELLED
        session.cancel()


async def test_a_source_whose_engine_is_lost_ends_the_handoff_at_once() -> None:
    async with relay(follow_grace_s=60.0) as it:
        await it.open()
        await it.attach()
        it.source.engine.die()
        assert (await it.reader.engine.expect(messages.HandoffFailed)).error.reason == "WorkerLostError"
        it.call.cancel()
        await it.reader.engine.expect(messages.Abort)


async def test_a_source_whose_engine_stands_still_tells_its_readers() -> None:
    """Its service is alive, so nothing is lost for the transport; and the engine may come back (PROTOCOL B3)."""
    async with relay(follow_grace_s=60.0) as it:
        await it.open()
        await it.attach()
        it.source.engine.declare_silent(3.0)
        failed = await it.reader.engine.expect(messages.HandoffFailed)
        assert (failed.id, failed.error.reason) == (it.id, "HandoffError")
        assert (await it.source.engine.expect(messages.FollowLost)).follow == it.follow
        it.call.cancel()
        await it.reader.engine.expect(messages.Abort)
        await wait_until(lambda: it.source.worker.streams.value == 0, "the Follow has ended")
        assert len(it.source.engine.sent_of(messages.FollowLost)) == 1


async def test_a_source_out_of_reach_is_given_up_after_the_grace_though_it_never_answered() -> None:
    """It issued the ticket a moment ago: there is no reason to wait longer than for one that was followed."""
    async with relay(follow_grace_s=0.3, call_timeout_s=60.0) as it:
        await it.reader.role.peers.connect(it.ticket)
        it.proxy.cut(refuse=True)
        await it.open()
        failed = await it.reader.engine.expect(messages.HandoffFailed)
        assert (failed.id, failed.error.reason) == (it.id, "WorkerLostError")
        it.call.cancel()
        await it.reader.engine.expect(messages.Abort)


async def test_a_channel_closed_just_before_the_follow_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relay() as it:
        connect = PeerBook.connect
        closed = open_channel(it.source.address)
        await closed.close()
        stubs: list[Any] = [kv_source_pb2_grpc.KvSourceServiceStub(closed)]

        async def connect_late(book: PeerBook, ticket: KvTicket) -> Any:
            return stubs.pop() if stubs else await connect(book, ticket)

        monkeypatch.setattr(PeerBook, "connect", connect_late)
        await it.open()
        await it.attach()
        await it.arrive()
        assert it.reader.engine.sent_of(messages.HandoffFailed) == []


async def test_a_follow_that_breaks_fails_its_handoff(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relay() as it:

        def break_down(*_: object) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(HandoffFollow, "_hear", break_down)
        await it.open()
        await it.attach()
        failed = await it.reader.engine.expect(messages.HandoffFailed)
        assert (failed.id, failed.error.reason) == (it.id, "InternalError")
        it.call.cancel()
        await it.reader.engine.expect(messages.Abort)


async def test_a_request_aborted_before_its_source_answers_leaves_no_stream() -> None:
    async with relay() as it:
        it.proxy.cut(refuse=True)
        await it.open()
        it.call.cancel()
        await it.reader.engine.expect(messages.Abort)
        await wait_until(lambda: len(it.reader.worker.request_tasks) == 0, "the follow's task has ended")
        assert it.source.engine.sent == []
