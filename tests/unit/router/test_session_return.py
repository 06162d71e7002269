"""A transport that is lost for 1.5 s fails no request (PROTOCOL B3, C7)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from cuttable_proxy import CuttableProxy, cuttable_proxy
from fake_relay import Relay, RelayMaker, next_delta, rest_of, tokens
from fake_worker import DecodeCall, FakeDecode, FakePrefill, decode_well, prefill_well

from kvrelay_client import Completion, GenerateStream
from kvrelay_core.errors import OverloadedError, StaleTicketError, SupersededError
from kvrelay_router.worker_session import WorkerState

PAUSE_S = 1.5


class Path:
    """A relay whose ways to its two workers can be interrupted."""

    def __init__(self, relay: Relay, to_prefill: CuttableProxy, to_decode: CuttableProxy) -> None:
        self.relay = relay
        self.prefill, self.decode = relay.prefill[0], relay.decode[0]
        self.to_prefill, self.to_decode = to_prefill, to_decode

    def ask(self, max_tokens: int) -> asyncio.Future[Completion]:
        return asyncio.ensure_future(self.relay.client.complete(token_ids=[1], max_tokens=max_tokens))

    async def lose(self, proxy: CuttableProxy) -> None:
        """Cuts the way until `restore`, and waits until the router has noticed."""
        proxy.cut(refuse=True)
        await self._until(proxy, WorkerState.LOST)

    async def restore(self, proxy: CuttableProxy) -> None:
        proxy.mend()
        await self._until(proxy, WorkerState.SERVING)

    async def _until(self, proxy: CuttableProxy, state: WorkerState) -> None:
        registry = self.relay.server.registry
        (session,) = (session for session in registry.sessions if session.key == proxy.address)
        async with asyncio.timeout(10):
            await registry.wait_until(lambda: session.state is state)


@pytest.fixture
async def path(make_relay: RelayMaker) -> AsyncIterator[Path]:
    prefill, decode = FakePrefill("prefill-0"), FakeDecode("decode-0")
    await prefill.start()
    await decode.start()
    async with cuttable_proxy(prefill.address) as to_prefill, cuttable_proxy(decode.address) as to_decode:
        through = {prefill.address: to_prefill.address, decode.address: to_decode.address}
        relay = await make_relay.connect([prefill], [decode], through, reattach_s=2.0, placement_wait_s=5.0)
        yield Path(relay, to_prefill, to_decode)
        async with asyncio.timeout(5):
            await relay.settled()


async def interrupt(proxy: CuttableProxy, kind: str) -> None:
    """For PAUSE_S: the length of the fault is what these tests are about."""
    if kind == "cut":
        proxy.cut(refuse=True)
    else:
        proxy.hold()
    await asyncio.sleep(PAUSE_S)
    proxy.mend()


@pytest.mark.parametrize("kind", ["cut", "stall"])
async def test_while_prefill_computes(path: Path, kind: str) -> None:
    path.decode.behaviour = decode_well
    answer = path.ask(6)
    call = await path.prefill.next_call()
    await interrupt(path.to_prefill, kind)
    call.accept()
    call.finish()
    done = await answer
    assert (done.token_ids, done.timing.attempts) == (tokens(6), 1)
    assert path.prefill.num_waiting_calls == 0


async def test_what_prefill_said_meanwhile_is_said_again(path: Path) -> None:
    path.decode.behaviour = decode_well
    answer = path.ask(6)
    call = await path.prefill.next_call()
    call.accept()
    await path.lose(path.to_prefill)
    call.finish()  # lost
    await path.restore(path.to_prefill)
    done = await answer
    assert (done.token_ids, done.timing.attempts) == (tokens(6), 1)
    assert call.reopened.is_set()
    assert len(path.decode.calls) == 1, "the ticket that was said twice was offered twice"


async def test_prefill_that_is_through_is_not_asked_again(path: Path) -> None:
    path.prefill.behaviour = prefill_well
    answer = path.ask(6)
    call = await path.decode.next_call()
    call.accept()
    call.generate(0, 2)
    (source,) = path.prefill.calls.values()
    async with asyncio.timeout(5):
        while path.relay.server.registry.prefill[path.to_prefill.address].num_open:  # noqa: ASYNC110  # no event for it
            await asyncio.sleep(0.001)
    await path.lose(path.to_prefill)
    await path.restore(path.to_prefill)
    call.generate(2, 6)
    call.end(6)
    assert (await answer).token_ids == tokens(6)
    # Asked after everything else on the session, so an open before it would have arrived.
    other = path.ask(1)
    assert (await other).token_ids == tokens(1)
    assert not source.reopened.is_set()


@pytest.mark.parametrize("kind", ["cut", "stall"])
async def test_while_decode_streams(path: Path, kind: str) -> None:
    path.prefill.behaviour = prefill_well
    async with path.relay.client.generate(token_ids=[1], max_tokens=8) as stream:
        call = await path.decode.next_call()
        seen = await first_two(stream, call)
        pause = asyncio.ensure_future(interrupt(path.to_decode, kind))
        await asyncio.sleep(0)
        call.generate(2, 5)  # lost or held up
        await pause
        needed = await asyncio.wait_for(call.reattached.get(), 5)
        call.generate(needed[0], 8)
        call.end(8)
        ids, finish = await rest_of(stream)
    assert (seen + ids, finish.timing.attempts) == (tokens(8), 1)


async def test_new_requests_wait_out_the_loss(path: Path) -> None:
    path.prefill.behaviour, path.decode.behaviour = prefill_well, decode_well
    await path.lose(path.to_prefill)
    await path.lose(path.to_decode)
    answer = path.ask(6)
    await path.restore(path.to_prefill)
    await path.restore(path.to_decode)
    done = await answer
    assert (done.token_ids, done.timing.attempts) == (tokens(6), 1)


async def test_an_abort_that_was_wanted_meanwhile_is_sent_on_return(path: Path) -> None:
    path.prefill.behaviour = prefill_well
    answer = path.ask(8)
    call = await path.decode.next_call()
    call.accept()
    await path.lose(path.to_decode)
    answer.cancel()
    await path.relay.settled()
    await path.restore(path.to_decode)
    await asyncio.wait_for(call.aborted.wait(), 5)
    assert call.reattached.empty()


async def test_a_cancel_that_was_wanted_meanwhile_is_sent_on_return(path: Path) -> None:
    answer = path.ask(8)
    call = await path.prefill.next_call()
    await path.lose(path.to_prefill)
    answer.cancel()
    await path.relay.settled()
    await path.restore(path.to_prefill)
    await asyncio.wait_for(call.cancelled.wait(), 5)
    assert not call.reopened.is_set()


@pytest.mark.parametrize("arrived", [False, True])
async def test_a_resume_during_the_loss_is_said_again_under_its_attempt(path: Path, arrived: bool) -> None:
    registry = path.relay.server.registry
    registry.decode[path.to_decode.address].description.decode_alone_tokens = 100
    path.prefill.behaviour = prefill_well
    answer = path.ask(4)
    call = await path.decode.next_call()
    call.lose_handoff(StaleTicketError("a word changed"))
    resume = await asyncio.wait_for(call.resumes.get(), 5)
    await path.lose(path.to_decode)
    await path.restore(path.to_decode)
    await asyncio.wait_for(call.reattached.get(), 5)
    if arrived:
        call.fail(SupersededError("attempt 1 is superseded by attempt 2"))
        await asyncio.wait_for(call.reattached.get(), 5)
    else:
        call.tokens((0, 1, 99))  # of the attempt that has ended
        call.lose_handoff(StaleTicketError("a word changed"))
        assert await asyncio.wait_for(call.resumes.get(), 5) == resume
    call.generate(0, 4)
    call.end(4)
    done = await answer
    assert (done.token_ids, done.timing.attempts) == (tokens(4), 2)


async def test_what_is_refused_on_return_goes_elsewhere(path: Path) -> None:
    """Decode does not know the request any more: it has no room for its past."""
    path.prefill.behaviour = prefill_well
    async with path.relay.client.generate(token_ids=[1], max_tokens=4) as stream:
        call = await path.decode.next_call()
        seen = await first_two(stream, call)
        await path.lose(path.to_decode)
        await path.restore(path.to_decode)
        await asyncio.wait_for(call.reattached.get(), 5)
        call.fail(OverloadedError("position 0 is not kept any more"))
        again = await path.decode.next_call()
        assert again.attempt.attempt == 2
        await decode_well(again)
        assert seen + (await rest_of(stream))[0] == tokens(4)


async def first_two(stream: GenerateStream, call: DecodeCall) -> list[int]:
    """Runs the call up to its second token, and waits until the client has it."""
    call.accept()
    call.generate(0, 2)
    seen: list[int] = []
    while len(seen) < 2:
        seen += (await next_delta(stream)).token_ids
    return seen
