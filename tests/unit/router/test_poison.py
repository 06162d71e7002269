"""A request that its workers die of is not handed through the fleet (PROTOCOL C5)."""

from __future__ import annotations

import pytest
from fake_relay import Relay, RelayMaker
from fake_worker import DecodeCall, PrefillCall, prefill_well

from kvrelay.v1.common_pb2 import KvTicket
from kvrelay_core.errors import OverloadedError, StaleTicketError, UnavailableError, WorkerLostError
from kvrelay_core.request import ChoiceState, Generation, SamplingParams
from kvrelay_router import itinerary_messages as m
from kvrelay_router.committer import Token
from kvrelay_router.itinerary import Itinerary

DEATH = WorkerLostError("the engine process exited with code -11; its log says why")


async def prefill_dies(call: PrefillCall) -> None:
    call.fail(DEATH)


async def prefill_dies_with_its_ticket(call: PrefillCall) -> None:
    call.accept()
    call.fail(DEATH)


async def decode_dies(call: DecodeCall) -> None:
    call.fail(DEATH)


async def decode_dies_running(call: DecodeCall) -> None:
    call.accept()
    call.fail(DEATH)


async def decode_misses_its_source(call: DecodeCall) -> None:
    call.lose_handoff(WorkerLostError("the source is gone"))


def num_calls(relay: Relay) -> tuple[int, int]:
    return sum(len(worker.calls) for worker in relay.prefill), sum(len(worker.calls) for worker in relay.decode)


async def test_two_dead_prefill_workers_are_enough(make_relay: RelayMaker) -> None:
    relay = await make_relay(6, 1, max_replacements=9)
    for worker in relay.prefill:
        worker.behaviour = prefill_dies
    with pytest.raises(UnavailableError, match="2 workers were lost"):
        await relay.client.complete(token_ids=[1], max_tokens=3)
    assert num_calls(relay) == (2, 0)


@pytest.mark.parametrize("dies", [decode_dies, decode_dies_running])
async def test_two_dead_decode_workers_are_enough(make_relay: RelayMaker, dies: object) -> None:
    relay = await make_relay(1, 6, max_replacements=9)
    relay.prefill[0].behaviour = prefill_well
    for worker in relay.decode:
        worker.behaviour = dies  # type: ignore[assignment]
    with pytest.raises(UnavailableError, match="2 workers were lost"):
        await relay.client.complete(token_ids=[1], max_tokens=3)
    assert num_calls(relay) == (2, 2)


async def test_a_death_is_a_replacement_and_not_a_refusal(make_relay: RelayMaker) -> None:
    relay = await make_relay(6, 1, max_replacements=0)
    for worker in relay.prefill:
        worker.behaviour = prefill_dies
    with pytest.raises(WorkerLostError, match="exited with code -11"):
        await relay.client.complete(token_ids=[1], max_tokens=3)
    assert num_calls(relay) == (1, 0)


async def test_a_source_that_dies_counts_whoever_notices_first(make_relay: RelayMaker) -> None:
    """Decode says that its source is gone before, or after, the source itself does."""
    for prefill in (prefill_well, prefill_dies_with_its_ticket):
        relay = await make_relay(6, 6, max_replacements=9)
        for source in relay.prefill:
            source.behaviour = prefill
        for reader in relay.decode:
            reader.behaviour = decode_misses_its_source
        with pytest.raises(UnavailableError, match="2 workers were lost"):
            await relay.client.complete(token_ids=[1], max_tokens=3)
        assert num_calls(relay)[0] == 2


def test_after_two_deaths_decode_is_not_asked_to_go_on_alone() -> None:
    generation = Generation(prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=4), seed=1)
    itinerary = Itinerary("r", generation, max_replacements=9)
    itinerary.start()
    stale = StaleTicketError("a word changed")
    for attempt in (1, 2):
        itinerary.handle(m.Placed("r", attempt, m.Route(f"p{attempt}", "d", decode_alone_tokens=100)))
        itinerary.handle(m.PrefillAccepted("r", attempt, KvTicket(ticket_id="t")))
        itinerary.handle(m.PrefillFailed("r", attempt, DEATH))
        if attempt == 1:
            (place,) = itinerary.handle(m.DecodeFailed("r", attempt, stale))
            assert isinstance(place, m.Place)
    abort, fail = itinerary.handle(m.HandoffLost("r", 2, stale))
    assert isinstance(abort, m.AbortDecode)
    assert isinstance(fail, m.Fail) and "2 workers were lost" in fail.error.message


def test_the_deaths_of_all_choices_count_together() -> None:
    """Choices that were placed apart carry the same prompt."""
    choices = (ChoiceState(0), ChoiceState(1))
    generation = Generation(prompt=(1,), sampling=SamplingParams(max_tokens=4), seed=1, choices=choices)
    itinerary = Itinerary("r", generation, max_replacements=9)
    itinerary.start()
    itinerary.handle(m.Placed("r", 1, m.Route(None, "d0")))
    itinerary.handle(m.DecodeTokens("r", 1, (Token(0, 0, 5), Token(1, 0, 6))))
    apart = itinerary.handle(m.HandedBack("r", 1, OverloadedError("preempted")))
    for place, worker in zip(apart, ("d1", "d2"), strict=True):
        assert isinstance(place, m.Place)
        itinerary.handle(m.Placed(place.leg, place.attempt, m.Route(None, worker)))
    first, second = (place for place in apart if isinstance(place, m.Place))
    assert isinstance(itinerary.handle(m.DecodeLost(first.leg, first.attempt, DEATH))[0], m.Place)
    outcome = itinerary.handle(m.DecodeFailed(second.leg, second.attempt, DEATH))[-1]
    assert isinstance(outcome, m.Fail) and "2 workers were lost" in outcome.error.message
