"""The sessions with workers: loss, return, restart, and workers that do not fit."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fake_relay import Relay, RelayMaker, first_call, tokens
from fake_worker import FakeDecode, FakePrefill, decode_well, prefill_well

from kvrelay.v1 import worker_pb2
from kvrelay_core.errors import DrainingError, UnavailableError
from kvrelay_router import worker_session
from kvrelay_router.worker_session import WorkerState


class LoadingDecode(FakeDecode):
    """Loads its model until the test ends that."""

    def __init__(self, worker_id: str) -> None:
        super().__init__(worker_id)
        self.was_asked_too_early = asyncio.Event()
        self._is_loading = True

    def describe(self) -> worker_pb2.DescribeResponse:
        if self._is_loading:
            self.was_asked_too_early.set()
            raise UnavailableError("the engine is still loading its model; try again soon")
        return super().describe()

    async def end_loading(self) -> None:
        self._is_loading = False
        assert self._server is not None
        await self._server.set_serving("kvrelay.v1.WorkerService", True)


async def until(relay: Relay, state: WorkerState, worker: FakePrefill | FakeDecode) -> None:
    registry = relay.server.registry
    session = next(session for session in registry.sessions if session.key == worker.address)
    async with asyncio.timeout(10):
        await registry.wait_until(lambda: session.state is state)


async def test_a_decode_session_comes_back_and_names_the_next_positions(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=6))
    call = await relay.decode[0].next_call()
    call.accept()
    call.generate(0, 2)
    await relay.decode[0].drop_session()
    call.generate(2, 4)  # lost with the stream
    needed = await asyncio.wait_for(call.reattached.get(), 5)
    assert needed[0] <= 2
    call.generate(needed[0], 6)
    call.end(6)
    answer = await request
    assert answer.token_ids == tokens(6)
    assert answer.timing.attempts == 1
    assert relay.decode[0].num_sessions == 2


async def test_an_open_that_was_not_answered_is_sent_again(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    call = await relay.decode[0].next_call()
    await relay.decode[0].drop_session()
    await asyncio.wait_for(call.reopened.wait(), 5)
    await decode_well(call)
    assert (await request).token_ids == tokens(3)


async def test_a_restarted_decode_has_lost_its_requests(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=4))
    call = await relay.decode[0].next_call()
    call.accept()
    call.generate(0, 2)
    await relay.decode[0].stop()
    await relay.decode[0].start()
    again = await relay.decode[0].next_call(timeout_s=10)
    assert again.attempt.attempt == 2
    await decode_well(again)
    assert (await request).token_ids == tokens(4)


async def test_a_restarted_prefill_has_lost_its_requests(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.decode[0].behaviour = decode_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    await relay.prefill[0].next_call()
    await relay.prefill[0].stop()
    await relay.prefill[0].start()
    again = await relay.prefill[0].next_call(timeout_s=10)
    assert again.attempt.attempt == 2
    await prefill_well(again)
    assert (await request).token_ids == tokens(3)


async def test_a_worker_is_served_as_soon_as_it_has_loaded(
    make_relay: RelayMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so itself: the router would look again an hour later."""
    monkeypatch.setattr(worker_session, "FIRST_BACKOFF_S", 3600.0)
    monkeypatch.setattr(worker_session, "MAX_BACKOFF_S", 3600.0)
    prefill, decode = FakePrefill("prefill-0"), LoadingDecode("decode-0")
    await prefill.start()
    await decode.start()
    making = asyncio.ensure_future(make_relay.connect([prefill], [decode]))
    await decode.was_asked_too_early.wait()
    await decode.end_loading()
    assert (await making).server.registry.is_ready


async def test_a_prefill_that_stays_away_has_lost_its_requests(make_relay: RelayMaker) -> None:
    relay = await make_relay(2, 1, reattach_s=0.1)
    relay.decode[0].behaviour = decode_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    call = await first_call(relay.prefill)
    gone, other = sorted(relay.prefill, key=lambda worker: call not in worker.calls.values())
    await gone.stop()
    await prefill_well(await other.next_call())
    answer = await request
    assert (answer.token_ids, answer.timing.attempts) == (tokens(3), 2)


async def test_without_workers_requests_are_unavailable_and_later_served(make_relay: RelayMaker) -> None:
    relay = await make_relay(placement_wait_s=0.1)
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour = decode_well
    await relay.decode[0].stop()
    await until(relay, WorkerState.LOST, relay.decode[0])
    with pytest.raises(UnavailableError, match="no decode worker"):
        await relay.client.complete(token_ids=[1], max_tokens=3)
    await relay.decode[0].start()
    await until(relay, WorkerState.SERVING, relay.decode[0])
    assert (await relay.client.complete(token_ids=[1], max_tokens=3)).token_ids == tokens(3)


@pytest.mark.parametrize("difference", ["fingerprint", "layout", "role"])
async def test_a_worker_that_does_not_fit_is_kept_out(
    make_relay: RelayMaker, difference: str, caplog: pytest.LogCaptureFixture
) -> None:
    relay = await make_relay(1, 2)
    odd = relay.decode[1]
    await odd.stop()
    await until(relay, WorkerState.LOST, odd)
    if difference == "fingerprint":
        odd.fingerprint = b"another model"
    elif difference == "layout":
        odd.layout.dtype = "bfloat16"
    else:
        odd.role = FakePrefill.role
    with caplog.at_level(logging.ERROR):
        await odd.start()
        await until(relay, WorkerState.REFUSED, odd)
    assert "is kept out" in caplog.text and odd.address in caplog.text
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour = decode_well
    for _ in range(3):
        assert (await relay.client.complete(token_ids=[1], max_tokens=3)).token_ids == tokens(3)
    assert not odd.calls


async def test_a_draining_worker_gets_nothing_new(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 2)
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour = decode_well

    async def refuse(call) -> None:  # type: ignore[no-untyped-def]
        call.fail(DrainingError("the worker drains"))

    relay.decode[1].behaviour = refuse
    for _ in range(6):
        assert (await relay.client.complete(token_ids=[1], max_tokens=3)).token_ids == tokens(3)
    assert len(relay.decode[1].calls) == 1
    session = relay.server.registry.decode[relay.decode[1].address]
    assert session.state is WorkerState.DRAINING
