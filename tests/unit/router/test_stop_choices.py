"""A stop string ends one choice of several: decode is told, and goes on with the others."""

from __future__ import annotations

import asyncio

from fake_relay import Relay, RelayMaker
from fake_worker import DecodeCall, PrefillCall, token_of

from kvrelay_client import Finish, GenerateStream
from kvrelay_core.errors import OverloadedError
from kvrelay_core.request import FinishReason, FirstToken


async def open_pair(relay: Relay) -> tuple[PrefillCall, DecodeCall]:
    prefill = await relay.prefill[0].next_call()
    prefill.accept()
    return prefill, await relay.decode[0].next_call()


async def finishes_of(stream: GenerateStream) -> dict[int, Finish]:
    return {event.index: event async for event in stream if isinstance(event, Finish)}


async def aborted(call: DecodeCall) -> list[int]:
    async with asyncio.timeout(5):
        return await call.aborted_choices.get()


async def test_decode_is_told_which_choice_is_wanted_no_more(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[1], max_tokens=4, n=3, stop="b") as stream:
        prefill, decode = await open_pair(relay)
        prefill.finish()
        decode.accept()
        decode.generate(1, 2, choice=0)  # a, b
        assert await aborted(decode) == [0]
        decode.generate(2, 4, choice=0)  # had not heard yet
        for choice in (1, 2):
            decode.tokens(*((choice, position, token_of(0, 0)) for position in range(1, 4)))
            decode.end(4, choice)
        finishes = await finishes_of(stream)
    assert (finishes[0].reason, finishes[0].stop_reason) == (FinishReason.STOP, "b")
    assert [finishes[choice].reason for choice in (1, 2)] == [FinishReason.LENGTH] * 2
    assert not decode.aborted.is_set(), "it ended by itself"


async def test_the_last_choice_ends_the_request(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[1], max_tokens=9, n=2, stop="b") as stream:
        prefill, decode = await open_pair(relay)
        prefill.finish()
        decode.accept()
        decode.generate(1, 2, choice=0)
        assert await aborted(decode) == [0]
        decode.tokens((1, 1, token_of(0, 1)))
        async with asyncio.timeout(5):
            await decode.aborted.wait()
        assert set(await finishes_of(stream)) == {0, 1}
    assert decode.aborted_choices.empty()


async def test_a_lost_session_is_told_again(make_relay: RelayMaker) -> None:
    relay = await make_relay()
    async with relay.client.generate(token_ids=[1], max_tokens=4, n=2, stop="b") as stream:
        prefill, decode = await open_pair(relay)
        prefill.finish()
        decode.accept()
        decode.generate(1, 2, choice=0)
        assert await aborted(decode) == [0]
        await relay.decode[0].drop_session()
        assert await aborted(decode) == [0]
        decode.tokens(*((1, position, token_of(0, 0)) for position in range(1, 4)))
        decode.end(4, 1)
        assert set(await finishes_of(stream)) == {0, 1}


async def test_a_choice_that_ended_with_the_first_token_is_aborted_where_the_ticket_goes_next(
    make_relay: RelayMaker,
) -> None:
    relay = await make_relay(num_decode=2)
    async with relay.client.generate(token_ids=[1], max_tokens=3, n=2, stop="a") as stream:
        prefill = await relay.prefill[0].next_call()
        prefill.accept()
        first, second = (worker.next_call() for worker in relay.decode)
        (done, waiting) = await asyncio.wait(
            [asyncio.ensure_future(first), asyncio.ensure_future(second)], return_when=asyncio.FIRST_COMPLETED
        )
        refusing = done.pop().result()
        prefill.finish([FirstToken(0, 0, token_of(0, 0)), FirstToken(1, 0, token_of(0, 3))])
        assert await aborted(refusing) == [0]
        refusing.fail(OverloadedError("no room"))
        decode = await waiting.pop()
        assert await aborted(decode) == [0]
        decode.accept()
        decode.tokens((1, 0, token_of(0, 3)), (1, 1, token_of(0, 3)), (1, 2, token_of(0, 3)))
        decode.end(3, 1)
        finishes = await finishes_of(stream)
    assert finishes[1].reason is FinishReason.LENGTH
