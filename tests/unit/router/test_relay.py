"""One request over real gRPC: router in the middle, fake workers, the real client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_relay import RelayMaker, next_delta, rest_of, tokens
from fake_worker import DecodeCall, decode_well, prefill_well, token_of

from kvrelay_client import Finish
from kvrelay_core.errors import DeadlineError, StaleTicketError
from kvrelay_core.request import FinishReason, FirstToken, Slo
from kvrelay_router.placement import Candidates, Decision, LeastLoad, RequestView


async def test_a_prompt_goes_in_and_tokens_come_out(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour = decode_well
    answer = await relay.client.complete(token_ids=[1, 2, 3], max_tokens=8, temperature=0)
    assert answer.token_ids == tokens(8)
    assert answer.text == "abcdefgh"
    assert answer.finish_reason is FinishReason.LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    assert answer.timing.attempts == 1
    assert answer.timing.queue_s == 0.25
    assert 0 < answer.timing.ttft_s <= answer.timing.total_s
    assert answer.timing.handoff is not None and answer.timing.handoff.connector == "fake"
    assert (answer.timing.prefill_worker, answer.timing.decode_worker) == ("prefill-0", "decode-0")


async def test_both_workers_get_the_same_generation_and_decode_the_ticket(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[5, 6], max_tokens=3, top_k=7, seed=11, timeout_s=30) as stream:
        prefill = await relay.prefill[0].next_call()
        assert prefill.handoff
        prefill.queue(0.1)
        prefill.accept()
        decode = await relay.decode[0].next_call()
        assert decode.ticket_id == f"ticket-{prefill.attempt.request_id}-1"
        assert decode.attempt == prefill.attempt
        assert decode.generation.prompt == (5, 6) and decode.generation.seed == 11
        assert decode.generation.sampling == prefill.generation.sampling
        assert decode.generation.sampling.top_k == 7
        assert decode.generation.eos_token_ids == (381, 382)
        assert decode.generation.deadline_s is not None and decode.generation.deadline_s < 35
        prefill.finish()
        await decode_well(decode)
        assert (await rest_of(stream))[0] == tokens(3)


async def test_the_promise_travels_with_the_request_and_shrinks_on_its_way(make_relay: RelayMaker) -> None:
    relay = await make_relay(max_replacements=1)
    seen: list[RequestView] = []
    policy = LeastLoad()

    class Watching:
        def place(self, request: RequestView, candidates: Candidates) -> Decision:
            seen.append(request)
            return policy.place(request, candidates)

    relay.server.fleet.use(Watching())
    promise: dict[str, Any] = {"ttft_ms": 60000.0, "itl_ms": 250.0, "priority": 2, "session_id": "s"}
    async with relay.client.generate(token_ids=[5], max_tokens=3, **promise) as stream:
        prefill = await relay.prefill[0].next_call()
        assert (seen[0].priority, seen[0].session_id, seen[0].slo.itl_s) == (2, "s", 0.25)
        assert seen[0].slo.ttft_s is not None and prefill.generation.slo.ttft_s is not None
        assert 60 > seen[0].slo.ttft_s >= prefill.generation.slo.ttft_s > 50
        prefill.accept()
        decode = await relay.decode[0].next_call()
        prefill.finish()
        assert (await next_delta(stream)).token_ids == (token_of(0, 0),)
        decode.fail(StaleTicketError("stale"))
        again = await relay.prefill[0].next_call()
        assert again.generation.slo == seen[1].slo == Slo(itl_s=0.25)  # the first token is there
        await prefill_well(again)
        await decode_well(await relay.decode[0].next_call())
        assert (await rest_of(stream))[0] == tokens(3)[1:]


async def test_the_first_token_comes_from_prefill_before_the_handoff(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[1], max_tokens=2) as stream:
        prefill = await relay.prefill[0].next_call()
        prefill.accept()
        decode = await relay.decode[0].next_call()
        prefill.finish()
        assert (await next_delta(stream)).token_ids == (token_of(0, 0),)
        decode.accept()
        decode.generate(0, 2)  # position 0 again
        decode.end(2)
        assert (await rest_of(stream))[0] == [token_of(0, 1)]


async def test_the_echo_of_decode_may_win(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[1], max_tokens=3) as stream:
        prefill = await relay.prefill[0].next_call()
        prefill.accept()
        decode = await relay.decode[0].next_call()
        decode.accept()
        decode.generate(0, 2)
        assert (await next_delta(stream)).token_ids[0] == token_of(0, 0)
        prefill.finish()
        decode.generate(2, 3)
        decode.end(3)
        _, finish = await rest_of(stream)
        assert finish.usage.completion_tokens == 3


async def test_copies_are_dropped_and_gaps_wait(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    async with relay.client.generate(token_ids=[1], max_tokens=5) as stream:
        decode = await relay.decode[0].next_call()
        decode.accept()
        for position in (0, 3, 1, 1, 4, 3):
            decode.tokens((0, position, token_of(0, position)))
        decode.tokens((0, 1, 99))  # another token at a committed position
        decode.generate(2, 3)
        decode.end(5)
        ids, finish = await rest_of(stream)
        assert ids == tokens(5)
        assert finish.reason is FinishReason.LENGTH


async def test_one_token_needs_no_decode(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[1], max_tokens=1) as stream:
        prefill = await relay.prefill[0].next_call()
        assert not prefill.handoff
        prefill.accept()
        prefill.finish()
        ids, finish = await rest_of(stream)
    assert ids == tokens(1)
    assert finish.reason is FinishReason.LENGTH and finish.timing.handoff is None
    assert relay.decode[0].num_waiting_calls == 0


async def test_an_end_at_the_first_token_aborts_decode(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[1], max_tokens=9) as stream:
        prefill = await relay.prefill[0].next_call()
        prefill.accept()
        decode = await relay.decode[0].next_call()
        prefill.finish([FirstToken(0, 0, 381, None, FinishReason.STOP)])
        ids, finish = await rest_of(stream)
        assert (ids, finish.reason, finish.stop_reason) == ([381], FinishReason.STOP, "381")
        await asyncio.wait_for(decode.aborted.wait(), 5)
        await asyncio.wait_for(prefill.released.wait(), 5)


@pytest.mark.parametrize("stage", ["opened", "accepted", "finished", "decoding"])
async def test_a_cancel_reaches_the_workers(make_relay: RelayMaker, stage: str) -> None:
    relay = await make_relay()
    decode: DecodeCall | None = None
    stream = relay.client.generate(token_ids=[1], max_tokens=9)
    prefill = await relay.prefill[0].next_call()
    if stage != "opened":
        prefill.accept()
        decode = await relay.decode[0].next_call()
    if stage in ("finished", "decoding"):
        prefill.finish()
        await next_delta(stream)
    if stage == "decoding" and decode is not None:
        decode.accept()
        decode.generate(0, 2)
        await next_delta(stream)
    stream.cancel()
    if decode is not None:
        await asyncio.wait_for(decode.aborted.wait(), 5)
    if stage in ("opened", "accepted"):
        await asyncio.wait_for(prefill.cancelled.wait(), 5)
    if stage == "finished":
        await asyncio.wait_for(prefill.released.wait(), 5)


async def test_a_deadline_reaches_client_and_workers(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    stream = relay.client.generate(token_ids=[1], max_tokens=9, timeout_s=0.3)
    prefill = await relay.prefill[0].next_call()
    with pytest.raises(DeadlineError):
        await anext(stream)
    await asyncio.wait_for(prefill.cancelled.wait(), 5)


async def test_stop_strings_across_tokens_end_the_request_and_abort_decode(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    async with relay.client.generate("hi", max_tokens=20, stop=["de"]) as stream:
        decode = await relay.decode[0].next_call()
        decode.accept()
        decode.generate(0, 4)  # abcd: the d is held back
        decode.generate(4, 6)
        text = ""
        async for event in stream:
            if isinstance(event, Finish):
                assert (event.reason, event.stop_reason) == (FinishReason.STOP, "de")
                assert event.usage.completion_tokens == 5
            else:
                text += event.text
        assert text == "abc"
        await asyncio.wait_for(decode.aborted.wait(), 5)


async def test_logprobs_come_with_their_tokens(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour = decode_well
    answer = await relay.client.complete(token_ids=[1], max_tokens=4, logprobs=1)
    assert [entry.logprob for entry in answer.logprobs] == [-0.5] * 4
    assert answer.logprobs[0].top == ((token_of(0, 0), -0.5),)
    plain = await relay.client.complete(token_ids=[1], max_tokens=4)
    assert plain.logprobs == []


async def test_a_burst_is_spread_over_cold_workers(make_relay: RelayMaker) -> None:
    relay = await make_relay(2, 3)
    for prefill in relay.prefill:
        prefill.behaviour = prefill_well
    for decode in relay.decode:
        decode.behaviour = decode_well
    answers = await asyncio.gather(*(relay.client.complete(token_ids=[1, index], max_tokens=5) for index in range(12)))
    assert all(answer.token_ids == tokens(5) for answer in answers)
    assert all(worker.calls for worker in relay.workers)
