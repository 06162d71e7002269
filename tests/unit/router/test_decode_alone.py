"""Requests that a decode worker computes from the first token on, without a hand-off."""

from __future__ import annotations

import asyncio

import pytest
from fake_relay import RelayMaker, first_call, rest_of, tokens
from fake_worker import DecodeCall, decode_well

from kvrelay_core.errors import OverloadedError, UnavailableError, WorkerLostError
from kvrelay_router.placement import Candidates, Decision, RequestView


class ShortPromptsAlone:
    """A policy that does not hand off what is quickly computed."""

    def place(self, request: RequestView, candidates: Candidates) -> Decision:
        prefill = None if request.num_input_tokens < 4 else candidates.prefill[0].key
        return Decision(prefill, candidates.decode[0].key)


async def test_without_prefill_workers_decode_does_everything(make_relay: RelayMaker) -> None:
    relay = await make_relay(0, 2)
    await asyncio.wait_for(relay.server.wait_ready(), 5)
    for worker in relay.decode:
        worker.behaviour = decode_well
    for max_tokens in (1, 5):
        answer = await relay.client.complete(token_ids=[1, 2, 3], max_tokens=max_tokens)
        assert answer.token_ids == tokens(max_tokens)
        assert (answer.timing.prefill_worker, answer.timing.attempts) == ("", 1)
        assert answer.timing.ttft_s > 0
    call = next(call for worker in relay.decode for call in worker.calls.values())
    assert call.ticket_id == ""
    assert call.generation.prompt == (1, 2, 3)


async def test_several_choices_begin_as_one_request(make_relay: RelayMaker) -> None:
    relay = await make_relay(0, 1)
    relay.decode[0].behaviour = decode_well
    answers = await relay.client.complete_all(token_ids=[1], max_tokens=4, n=2)
    assert [answer.token_ids for answer in answers] == [tokens(4, 0), tokens(4, 1)]
    assert len(relay.decode[0].calls) == 1


async def test_the_policy_decides(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.server.fleet.use(ShortPromptsAlone())
    relay.decode[0].behaviour = decode_well
    assert (await relay.client.complete(token_ids=[1, 2], max_tokens=3)).token_ids == tokens(3)
    assert not relay.prefill[0].calls
    long = asyncio.ensure_future(relay.client.complete(token_ids=[1, 2, 3, 4], max_tokens=3))
    prefill = await relay.prefill[0].next_call()
    prefill.accept()
    prefill.finish()
    assert (await long).token_ids == tokens(3)


async def test_a_full_decode_passes_it_on_for_free(make_relay: RelayMaker) -> None:
    relay = await make_relay(0, 2, max_replacements=0)
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    full = await first_call(relay.decode)
    full.fail(OverloadedError("no blocks"))
    other = await first_call(relay.decode)
    assert other.attempt.attempt == 2
    await decode_well(other)
    assert (await request).token_ids == tokens(3)


async def test_when_all_stay_full_it_is_shed(make_relay: RelayMaker) -> None:
    relay = await make_relay(0, 2, refused_wait_s=0.2)

    async def refuse(call: DecodeCall) -> None:
        call.fail(OverloadedError("no blocks"))

    for worker in relay.decode:
        worker.behaviour = refuse
    with pytest.raises(OverloadedError, match="no blocks"):
        await relay.client.complete(token_ids=[1], max_tokens=3)


async def test_it_goes_on_elsewhere_with_its_tokens(make_relay: RelayMaker) -> None:
    relay = await make_relay(0, 2)
    async with relay.client.generate(token_ids=[1], max_tokens=5) as stream:
        dying = await first_call(relay.decode)
        dying.generate(0, 2)
        dying.fail(WorkerLostError("the engine process exited"))
        again = await first_call(relay.decode)
        assert again.generation.choices[0].committed == tuple(tokens(2))
        again.generate(2, 5)
        again.end(5)
        ids, finish = await rest_of(stream)
    assert (ids, finish.timing.attempts) == (tokens(5), 2)


async def test_a_cancel_aborts_it(make_relay: RelayMaker) -> None:
    relay = await make_relay(0, 1)
    stream = relay.client.generate(token_ids=[1], max_tokens=5)
    call = await relay.decode[0].next_call()
    stream.cancel()
    await asyncio.wait_for(call.aborted.wait(), 5)


async def test_a_listed_prefill_role_is_needed(make_relay: RelayMaker) -> None:
    relay = await make_relay(placement_wait_s=0.1)
    await relay.prefill[0].stop()
    registry = relay.server.registry
    async with asyncio.timeout(5):
        await registry.wait_until(lambda: not registry.is_ready)
    with pytest.raises(UnavailableError, match="no prefill worker"):
        await relay.client.complete(token_ids=[1], max_tokens=3)
