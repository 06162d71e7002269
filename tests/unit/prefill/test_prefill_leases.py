"""Which prefill goes on, and which record is kept, while the router and readers of its ticket come and go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from prefill_rig import Fake, follow_ticket, open_message, open_session, read_event, say_accepted, say_finished
from worker_rig import read_one, running_worker, wait_until

from kvrelay.v1 import kv_source_pb2
from kvrelay.v1 import prefill_pb2 as pb
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import LeaseExpiredError
from kvrelay_engine import messages
from kvrelay_prefill.role import PrefillRole


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[Fake]:
    async with running_worker(PrefillRole) as worker:
        yield worker


async def open_followed(fake: Fake) -> tuple[Any, int, Any, int]:
    """The router's call, the request's id, a reader's call and its Follow: the prefill is not finished."""
    call = await open_session(fake)
    await call.write(open_message(handle=1))
    command = await fake.engine.expect(messages.Prefill)
    say_accepted(fake, command.id)
    await read_event(call, 1)
    return call, command.id, *await follow_ticket(fake)


async def lose_router(fake: Fake, call: Any, request_id: int) -> None:
    call.cancel()
    assert (await fake.engine.expect(messages.PrefillStreamClosed)).id == request_id
    assert fake.engine.sent_of(messages.Abort) == []


async def release(follow: Any, reason: kv_source_pb2.ReleaseReason.ValueType) -> None:
    message = kv_source_pb2.FollowRelease(reason=reason)
    await follow.write(kv_source_pb2.FollowRequest(release=message))


async def test_without_its_router_a_prefill_goes_on_for_its_reader_and_is_forgotten_at_its_end(fake: Fake) -> None:
    call, request_id, follow, number = await open_followed(fake)
    await lose_router(fake, call, request_id)
    assert fake.worker.num_live_requests == 1
    say_finished(fake, request_id)
    assert len(fake.role.requests) == 0
    fake.engine.dispatch(messages.FollowReady(number, (2,)))
    assert (await read_one(follow)).ready.groups[0].num_blocks == 2
    follow.cancel()
    assert fake.engine.sent_of(messages.Abort) == []


@pytest.mark.parametrize(
    "reason",
    [
        kv_source_pb2.RELEASE_REASON_CANCELLED,
        kv_source_pb2.RELEASE_REASON_REFUSED,  # there is no router to offer the ticket to another reader
    ],
)
async def test_without_its_router_a_prefill_ends_when_its_reader_leaves(
    fake: Fake, reason: kv_source_pb2.ReleaseReason.ValueType
) -> None:
    call, request_id, follow, _ = await open_followed(fake)
    await lose_router(fake, call, request_id)
    await release(follow, reason)
    assert (await fake.engine.expect(messages.Abort)).id == request_id
    assert len(fake.role.requests) == 0


async def test_without_its_router_a_prefill_ends_when_the_engine_gives_up_its_reader(fake: Fake) -> None:
    call, request_id, _, number = await open_followed(fake)
    await lose_router(fake, call, request_id)
    fake.engine.dispatch(messages.FollowFailed(number, info_of(LeaseExpiredError("its reader sent no heartbeat"))))
    assert (await fake.engine.expect(messages.Abort)).id == request_id


async def test_without_its_router_a_prefill_waits_for_a_lost_reader_as_long_as_its_lease(fake: Fake) -> None:
    call, request_id, follow, _ = await open_followed(fake)
    await lose_router(fake, call, request_id)
    follow.cancel()
    await fake.engine.expect(messages.FollowLost)
    fake.clock.advance(1.9)
    fake.engine.beat()
    again, _ = await follow_ticket(fake)
    fake.clock.advance(60.0)
    fake.engine.beat()
    assert fake.engine.sent_of(messages.Abort) == []
    again.cancel()
    await fake.engine.expect(messages.FollowLost)
    fake.clock.advance(2.6)
    fake.engine.beat()
    assert (await fake.engine.expect(messages.Abort)).id == request_id


async def test_a_reader_that_was_lost_when_the_router_went_may_come_back(fake: Fake) -> None:
    call, request_id, follow, _ = await open_followed(fake)
    follow.cancel()
    await fake.engine.expect(messages.FollowLost)
    await lose_router(fake, call, request_id)
    again, _ = await follow_ticket(fake)
    fake.clock.advance(60.0)
    fake.engine.beat()
    assert fake.engine.sent_of(messages.Abort) == []
    again.cancel()


async def test_with_its_router_a_prefill_goes_on_whatever_its_readers_do(fake: Fake) -> None:
    call, _, follow, _ = await open_followed(fake)
    await release(follow, kv_source_pb2.RELEASE_REASON_CANCELLED)
    await fake.engine.expect(messages.FollowRelease)
    fake.clock.advance(60.0)
    fake.engine.beat()
    assert fake.engine.sent_of(messages.Abort) == []
    assert fake.worker.num_live_requests == 1
    call.cancel()


async def test_a_refused_ticket_is_the_routers_for_as_long_as_its_new_lease(fake: Fake) -> None:
    call, request_id, follow, _ = await open_followed(fake)
    say_finished(fake, request_id)
    fake.clock.advance(29.0)
    await release(follow, kv_source_pb2.RELEASE_REASON_REFUSED)
    await fake.engine.expect(messages.FollowRelease)
    fake.clock.advance(29.0)  # more than the first lease could last
    fake.engine.beat()
    await call.write(pb.PrefillServiceSessionRequest(release=pb.HandleCancel(handle=1)))
    assert (await fake.engine.expect(messages.PrefillStreamClosed)).id == request_id
    assert len(fake.role.requests) == 0


async def test_a_record_lives_as_long_as_a_reader_follows(fake: Fake) -> None:
    call, request_id, follow, _ = await open_followed(fake)
    say_finished(fake, request_id)
    fake.clock.advance(100.0)
    fake.engine.beat()
    assert len(fake.role.requests) == 1
    follow.cancel()
    await fake.engine.expect(messages.FollowLost)
    fake.clock.advance(2.6)
    fake.engine.beat()
    assert len(fake.role.requests) == 0
    call.cancel()


async def test_a_router_that_was_away_while_its_prefill_was_finished_and_pulled_still_learns_of_it(fake: Fake) -> None:
    call, request_id, follow, _ = await open_followed(fake)
    call.cancel()
    await wait_until(lambda: len(fake.role.servicer._sessions) == 0, "the loss is noticed")
    say_finished(fake, request_id)
    await release(follow, kv_source_pb2.RELEASE_REASON_PULLED)
    await fake.engine.expect(messages.FollowRelease)
    again = await open_session(fake)
    await again.write(open_message(handle=4))
    assert [(await read_event(again, 4)).WhichOneof("event") for _ in range(2)] == ["accepted", "finished"]
    again.cancel()
