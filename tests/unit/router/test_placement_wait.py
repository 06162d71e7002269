"""How long a request waits for somebody to take it."""

from __future__ import annotations

import asyncio
import time

import pytest
from fake_relay import Relay, RelayMaker, first_call, next_delta, tokens
from fake_worker import DecodeCall, FakeDecode, FakePrefill, PrefillCall, decode_well, prefill_well

from kvrelay_core.errors import DeadlineError, DrainingError, OverloadedError, UnavailableError
from kvrelay_router.worker_session import WorkerState

FULL = OverloadedError("no blocks")


async def lose(relay: Relay, worker: FakePrefill | FakeDecode) -> None:
    await worker.stop()
    registry = relay.server.registry
    (session,) = (session for session in registry.sessions if session.key == worker.address)
    async with asyncio.timeout(5):
        await registry.wait_until(lambda: session.state is WorkerState.LOST)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_role_that_restarts_is_waited_for(make_relay: RelayMaker, role: str) -> None:
    relay = await make_relay(placement_wait_s=20.0)
    relay.prefill[0].behaviour, relay.decode[0].behaviour = prefill_well, decode_well
    worker = relay.prefill[0] if role == "prefill" else relay.decode[0]
    await lose(relay, worker)
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    while not relay.server.inference.num_calls:  # noqa: ASYNC110  # no event for it
        await asyncio.sleep(0.001)
    assert not request.done()
    await worker.start()
    assert (await request).token_ids == tokens(3)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_it_says_which_role_is_missing_and_for_how_long(make_relay: RelayMaker, role: str) -> None:
    relay = await make_relay(placement_wait_s=0.2)
    await lose(relay, relay.prefill[0] if role == "prefill" else relay.decode[0])
    with pytest.raises(UnavailableError, match=rf"no {role} worker serves.* 0\.2 s"):
        await relay.client.complete(token_ids=[1], max_tokens=3)


async def test_it_waits_no_longer_than_the_deadline(make_relay: RelayMaker) -> None:
    relay = await make_relay(placement_wait_s=60.0)
    await lose(relay, relay.decode[0])
    with pytest.raises(DeadlineError):
        await relay.client.complete(token_ids=[1], max_tokens=3, timeout_s=0.2)


async def test_a_lost_ticket_holder_waits_for_a_restarted_reader(make_relay: RelayMaker) -> None:
    """Decode dies with the request, is the only one, and comes back."""
    relay = await make_relay(placement_wait_s=20.0)
    relay.prefill[0].behaviour = prefill_well
    async with relay.client.generate(token_ids=[1], max_tokens=3) as stream:
        assert (await next_delta(stream)).token_ids == tuple(tokens(1))
        await relay.decode[0].next_call()
        await lose(relay, relay.decode[0])
        await relay.decode[0].start()
        await decode_well(await relay.decode[0].next_call())
        ids = [token async for event in stream for token in getattr(event, "token_ids", ())]
    assert ids == tokens(3)[1:]


async def test_a_worker_that_drains_and_restarts_is_asked_again(make_relay: RelayMaker) -> None:
    relay = await make_relay(placement_wait_s=20.0)
    worker = relay.prefill[0]
    relay.decode[0].behaviour = decode_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    call = await worker.next_call()
    call.fail(DrainingError("the worker drains"))
    await lose(relay, worker)
    await worker.start()
    await prefill_well(await worker.next_call())
    assert (await request).token_ids == tokens(3)


async def test_readers_that_are_full_are_asked_again_with_the_same_ticket(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 2, refused_wait_s=20.0)
    relay.prefill[0].behaviour = prefill_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    tickets = set()
    for _ in range(5):
        call = await first_call(relay.decode)
        tickets.add((call.ticket_id, call.attempt))
        call.fail(FULL)
    taker = await first_call(relay.decode)
    tickets.add((taker.ticket_id, taker.attempt))
    await decode_well(taker)
    answer = await request
    assert answer.token_ids == tokens(3)
    assert answer.timing.attempts == 1
    assert len(tickets) == 1 and len(relay.prefill[0].calls) == 1


async def test_no_longer_than_the_ticket_is_good(make_relay: RelayMaker) -> None:
    relay = await make_relay(refused_wait_s=60.0)
    relay.decode[0].behaviour = refuse
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    call = await relay.prefill[0].next_call()
    call.first_follow_s = 0.2
    await prefill_well(call)
    started_s = time.monotonic()
    with pytest.raises(OverloadedError, match="no blocks"):
        await request
    assert time.monotonic() - started_s < 20
    assert len(relay.decode[0].calls) > 1
    await asyncio.wait_for(call.released.wait(), 5)


async def test_a_new_reader_need_not_wait_for_the_back_off(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 2, refused_wait_s=60.0)
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour, relay.decode[1].behaviour = refuse, decode_well
    await lose(relay, relay.decode[1])
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    while len(relay.decode[0].calls) < 2:  # noqa: ASYNC110  # no event for it
        await asyncio.sleep(0.001)
    await relay.decode[1].start()
    assert (await request).token_ids == tokens(3)


async def test_a_full_prefill_sheds_at_once(make_relay: RelayMaker) -> None:
    relay = await make_relay(refused_wait_s=60.0)

    async def refuse_prefill(call: PrefillCall) -> None:
        call.fail(OverloadedError("queue is full"))

    relay.prefill[0].behaviour = refuse_prefill
    with pytest.raises(OverloadedError, match="queue is full"):
        await relay.client.complete(token_ids=[1], max_tokens=3)
    assert len(relay.prefill[0].calls) == 1


async def test_a_cancel_while_it_waits_leaves_nothing(make_relay: RelayMaker) -> None:
    relay = await make_relay(refused_wait_s=60.0)
    relay.decode[0].behaviour = refuse
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    call = await relay.prefill[0].next_call()
    await prefill_well(call)
    while len(relay.decode[0].calls) < 2:  # noqa: ASYNC110  # no event for it
        await asyncio.sleep(0.001)
    request.cancel()
    await asyncio.wait_for(call.released.wait(), 5)


async def refuse(call: DecodeCall) -> None:
    call.fail(FULL)
