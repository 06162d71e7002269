"""What becomes of a request when hand-offs break, workers refuse, or workers die."""

from __future__ import annotations

import asyncio

import pytest
from fake_relay import RelayMaker, first_call, next_delta, rest_of, tokens, worker_of
from fake_worker import DecodeCall, PrefillCall, decode_well, prefill_well, token_of

from kvrelay_client import Delta
from kvrelay_core.errors import (
    HandoffError,
    InternalError,
    OverloadedError,
    StaleTicketError,
    UnavailableError,
)
from kvrelay_router.itinerary import Itinerary


async def test_a_lost_handoff_of_a_short_prompt_resumes_on_decode(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.server.registry.decode[relay.decode[0].address].description.decode_alone_tokens = 16
    relay.prefill[0].behaviour = prefill_well
    async with relay.client.generate(token_ids=[1, 2], max_tokens=4) as stream:
        decode = await relay.decode[0].next_call()
        assert (await next_delta(stream)).token_ids == (token_of(0, 0),)
        decode.lose_handoff(StaleTicketError("a word changed"))
        resume = await asyncio.wait_for(decode.resumes.get(), 5)
        assert resume.attempt.attempt == 2
        assert [list(choice.committed_token_ids) for choice in resume.choices] == [tokens(1)]
        decode.generate(1, 4)
        decode.end(4)
        ids, finish = await rest_of(stream)
        assert ids == tokens(4)[1:]
        assert finish.timing.attempts == 2
        (prefill,) = relay.prefill[0].calls.values()
        await asyncio.wait_for(prefill.released.wait(), 5)


@pytest.mark.parametrize(("verified_tokens", "resumes"), [(23, False), (24, True), (40, True)])
async def test_only_what_decode_has_not_got_counts_as_recomputed(
    make_relay: RelayMaker, verified_tokens: int, resumes: bool
) -> None:
    relay = await make_relay()
    relay.server.registry.decode[relay.decode[0].address].description.decode_alone_tokens = 17
    relay.prefill[0].behaviour = prefill_well
    async with relay.client.generate(token_ids=[1] * 40, max_tokens=4) as stream:
        decode = await relay.decode[0].next_call()
        assert (await next_delta(stream)).token_ids == (token_of(0, 0),)
        decode.lose_handoff(StaleTicketError("a word changed"), verified_tokens)  # of 40 and the committed one
        if resumes:
            await asyncio.wait_for(decode.resumes.get(), 5)
        else:
            await asyncio.wait_for(decode.aborted.wait(), 5)


async def test_a_lost_handoff_of_a_long_prompt_is_placed_anew_elsewhere(make_relay: RelayMaker) -> None:
    relay = await make_relay(2, 2)
    for worker in relay.prefill:
        worker.behaviour = prefill_well
    async with relay.client.generate(token_ids=[1, 2], max_tokens=4) as stream:
        assert (await next_delta(stream)).token_ids == (token_of(0, 0),)
        lost = await first_call(relay.decode)
        lost.lose_handoff(StaleTicketError("a word changed"))
        await asyncio.wait_for(lost.aborted.wait(), 5)
        again = await first_call(relay.decode)
        assert again.attempt.attempt == 2
        assert again.generation.choices[0].committed == (token_of(0, 0),)
        again.accept()
        again.generate(1, 4)
        again.end(4)
        ids, finish = await rest_of(stream)
    assert ids == tokens(4)[1:]
    assert finish.usage.completion_tokens == 4
    used = [len(worker.calls) for worker in relay.workers]
    assert used == [1, 1, 1, 1], "the second attempt took the other workers"


async def test_the_second_lost_handoff_fails_typed(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour = lose_handoff
    with pytest.raises(HandoffError, match="a word changed"):
        await relay.client.complete(token_ids=[1], max_tokens=4)
    assert len(relay.decode[0].calls) == 2


async def lose_handoff(call: DecodeCall) -> None:
    call.lose_handoff(StaleTicketError("a word changed"))


async def test_decode_dies_in_the_middle_and_another_goes_on(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 2)
    relay.prefill[0].behaviour = prefill_well
    async with relay.client.generate(token_ids=[1, 2], max_tokens=6) as stream:
        dying = await first_call(relay.decode)
        dying.accept()
        dying.generate(0, 3)
        seen: list[int] = []
        while len(seen) < 3:
            seen += (await next_delta(stream)).token_ids
        worker = worker_of(relay, dying)
        other = next(other for other in relay.decode if other is not worker)
        await worker.stop()
        again = await other.next_call()
        assert again.generation.choices[0].committed == tuple(tokens(3))
        again.accept()
        again.generate(3, 6)
        again.end(6)
        ids, finish = await rest_of(stream)
    assert seen + ids == tokens(6)
    assert finish.timing.attempts == 2
    assert finish.timing.decode_worker == other.worker_id


async def test_a_full_decode_passes_the_same_ticket_on(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 2)
    async with relay.client.generate(token_ids=[1], max_tokens=3) as stream:
        prefill = await relay.prefill[0].next_call()
        prefill.accept()
        full = await first_call(relay.decode)
        prefill.finish()
        assert (await next_delta(stream)).token_ids == (token_of(0, 0),)
        full.fail(OverloadedError("no blocks"))
        taker = await first_call(relay.decode)
        assert worker_of(relay, taker) is not worker_of(relay, full)
        assert (taker.ticket_id, taker.attempt) == (full.ticket_id, full.attempt)
        assert taker.generation.choices[0].committed == (), "as prefill got it: the ticket brings the first token"
        taker.accept()
        taker.generate(0, 3)
        taker.end(3)
        ids, finish = await rest_of(stream)
    assert ids == tokens(3)[1:]
    assert finish.timing.attempts == 1
    assert len(relay.prefill[0].calls) == 1


async def test_when_every_decode_is_full_the_request_is_shed(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 2)
    relay.prefill[0].behaviour = prefill_well

    async def refuse(call: DecodeCall) -> None:
        call.fail(OverloadedError("no blocks"))

    for worker in relay.decode:
        worker.behaviour = refuse
    with pytest.raises(OverloadedError, match="no blocks"):
        await relay.client.complete(token_ids=[1], max_tokens=3)
    assert all(len(worker.calls) > 1 for worker in relay.decode), "asked again while the ticket was good"
    (prefill,) = relay.prefill[0].calls.values()
    await asyncio.wait_for(prefill.released.wait(), 5)


async def test_a_full_prefill_passes_the_request_on(make_relay: RelayMaker) -> None:
    relay = await make_relay(2, 1)

    async def refuse_first(call: PrefillCall) -> None:
        if call.attempt.attempt == 1:
            call.fail(OverloadedError("queue is full"))
        else:
            await prefill_well(call)

    for worker in relay.prefill:
        worker.behaviour = refuse_first
    relay.decode[0].behaviour = decode_well
    answer = await relay.client.complete(token_ids=[1], max_tokens=3)
    assert answer.token_ids == tokens(3)
    assert [len(worker.calls) for worker in relay.prefill] == [1, 1]


async def test_prefill_dies_before_it_accepts(make_relay: RelayMaker) -> None:
    relay = await make_relay(2, 1)
    relay.decode[0].behaviour = decode_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    call = await first_call(relay.prefill)
    victim = next(worker for worker in relay.prefill if call in worker.calls.values())
    await victim.stop()
    survivor = next(worker for worker in relay.prefill if worker is not victim)
    await prefill_well(await survivor.next_call())
    answer = await request
    assert answer.token_ids == tokens(3)
    assert answer.timing.attempts == 2


async def test_without_another_prefill_its_death_is_a_typed_error(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    await relay.prefill[0].next_call()
    await relay.prefill[0].stop()
    with pytest.raises(UnavailableError, match=r"no prefill worker serves.*; before that: "):
        await request


async def test_a_request_that_two_workers_died_of_is_not_tried_again(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 3, max_replacements=5)
    relay.prefill[0].behaviour = prefill_well
    request = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    for _ in range(2):
        victim = worker_of(relay, await first_call(relay.decode))
        await victim.stop()
    with pytest.raises(UnavailableError, match="2 workers were lost"):
        await request


async def test_a_preempted_request_goes_on_elsewhere_with_its_tokens(make_relay: RelayMaker) -> None:
    relay = await make_relay(max_replacements=0)
    relay.prefill[0].behaviour = prefill_well
    async with relay.client.generate(token_ids=[1], max_tokens=4) as stream:
        call = await relay.decode[0].next_call()
        call.accept()
        call.generate(0, 2)
        call.hand_back(OverloadedError("preempted"))
        again = await relay.decode[0].next_call()
        assert again.generation.choices[0].committed == tuple(tokens(2))
        again.accept()
        again.generate(2, 4)
        again.end(4)
        assert (await rest_of(stream))[0] == tokens(4)


async def test_two_choices_and_a_loss_split_into_a_leg_each(make_relay: RelayMaker) -> None:
    relay = await make_relay(1, 2)
    relay.prefill[0].behaviour = prefill_well
    seen: dict[int, list[int]] = {0: [], 1: []}
    async with relay.client.generate(token_ids=[1], max_tokens=4, n=2) as stream:
        both = await first_call(relay.decode)
        assert [choice.index for choice in both.generation.choices] == [0, 1]
        both.accept()
        both.generate(0, 2, choice=0)
        both.generate(0, 1, choice=1)
        while len(seen[0]) + len(seen[1]) < 3:
            delta = await next_delta(stream)
            seen[delta.index] += delta.token_ids
        worker = worker_of(relay, both)
        survivor = next(other for other in relay.decode if other is not worker)
        await worker.stop()
        legs = [await survivor.next_call(), await survivor.next_call()]
        assert {leg.attempt.attempt for leg in legs} == {2, 3}
        assert len({leg.attempt.request_id for leg in legs}) == 2
        for leg in legs:
            (choice,) = leg.generation.choices
            assert choice.committed == tuple(tokens(2 - choice.index, choice.index))
            leg.accept()
            leg.generate(len(choice.committed), 4, choice.index)
            leg.end(4, choice.index)
        async for event in stream:
            if isinstance(event, Delta):
                seen[event.index] += event.token_ids
    assert seen == {0: tokens(4, 0), 1: tokens(4, 1)}


async def test_a_bug_in_one_request_breaks_nothing_else(
    make_relay: RelayMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    relay = await make_relay()
    broken = asyncio.ensure_future(relay.client.complete(token_ids=[1], max_tokens=3))
    prefill = await relay.prefill[0].next_call()
    with monkeypatch.context() as patched:
        patched.setattr(Itinerary, "_on_accepted", lambda *_: 1 / 0)
        prefill.accept()
        with pytest.raises(InternalError, match="a bug in the router"):
            await broken
    await asyncio.wait_for(prefill.cancelled.wait(), 5)
    assert "ZeroDivisionError" in caplog.text
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour = decode_well
    assert (await relay.client.complete(token_ids=[1], max_tokens=3)).token_ids == tokens(3)
