"""Some choices of a request are aborted: their blocks are free at once, and the others do not notice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_rig import EnginePair, EngineRig, make_generation, prompt_of
from fake_runner import continuation

from kvrelay_core.errors import DeadlineError
from kvrelay_core.request import ChoiceState
from kvrelay_engine import messages
from kvrelay_transfer.connectors.base import TransferState

PROMPT = prompt_of(10)  # two full blocks and a partial one


@pytest.fixture
def rig() -> Iterator[EngineRig]:
    made = EngineRig()
    yield made
    made.check_empty()
    made.close()


@pytest.fixture
def pair() -> Iterator[EnginePair]:
    made = EnginePair(decode={"decode_alone_tokens": 64})
    yield made
    made.check_empty()
    made.close()


def abort(rig: EngineRig, *choices: int) -> None:
    rig.engine.handle(messages.Abort(1, "a stop string", choices))


def step_until_branched(rig: EngineRig, num_tokens: int = 3) -> None:
    while len(rig.tokens(1, 0)) < num_tokens:
        rig.step()


def test_the_blocks_of_an_aborted_choice_are_free_at_once(rig: EngineRig) -> None:
    rig.decode(1, make_generation(PROMPT, 30, num_choices=3))
    step_until_branched(rig, num_tokens=5)
    before = rig.load().blocks_in_use
    abort(rig, 1)
    assert rig.load().blocks_in_use == before - 2, "its copy of the partial block, and one of its own"
    abort(rig, 1)  # idempotent
    abort(rig, 1, 7)
    rig.run()
    assert len(rig.tokens(1, 1)) == 5
    assert rig.tokens(1, 0) == rig.tokens(1, 2) == continuation(PROMPT, 30)
    assert {event.choice for event in rig.of(messages.ChoiceFinished)} == {0, 2}


def test_after_the_last_choice_the_request_is_over(rig: EngineRig) -> None:
    rig.decode(1, make_generation(PROMPT, 30, num_choices=2))
    step_until_branched(rig)
    abort(rig, 0)
    assert rig.engine.has_requests
    abort(rig, 1)
    assert not rig.engine.has_requests and rig.load().blocks_in_use == 0
    abort(rig, 0, 1)
    assert not rig.step()
    assert not rig.of(messages.ChoiceFinished) and not rig.of(messages.RequestFailed)


def test_a_choice_that_has_ended_is_no_reason_to_go_on(rig: EngineRig) -> None:
    rig.decode(1, make_generation(PROMPT, 30, num_choices=2))
    step_until_branched(rig)
    abort(rig, 1)
    rig.run()
    assert rig.finish(1, 0).num_tokens == 30
    abort(rig, 0)
    assert not rig.engine.has_requests


def test_choices_that_are_aborted_before_the_prompt_is_computed_never_run(rig: EngineRig) -> None:
    rig.decode(1, make_generation(PROMPT, 6, num_choices=3))
    abort(rig, 0, 2)  # the trunk itself, for one
    rig.run()
    assert rig.tokens(1, 0) == rig.tokens(1, 2) == []
    assert rig.tokens(1, 1) == continuation(PROMPT, 6)


def test_choices_that_are_aborted_before_the_handoff_is_complete_never_run(pair: EnginePair) -> None:
    pair.lands_reads = False
    pair.submit(1, make_generation(PROMPT, 6, num_choices=3))
    while not pair.fabric.pending:
        pair.turn()
    abort(pair.reader, 0)
    assert pair.reader.load().requests_waiting_remote_kv == 1
    pair.lands_reads = True
    pair.run()
    assert pair.reader.tokens(1, 0) == []
    assert pair.reader.tokens(1, 1) == pair.reader.tokens(1, 2) == continuation(PROMPT, 6)


def test_when_all_are_aborted_during_the_handoff_it_is_given_up(pair: EnginePair) -> None:
    pair.lands_reads = False
    pair.submit(1, make_generation(PROMPT, 6, num_choices=2))
    while not pair.fabric.pending:
        pair.turn()
    abort(pair.reader, 0)
    abort(pair.reader, 1)
    pair.lands_reads = True
    pair.run()
    assert pair.reader.of(messages.HandoffRelease)
    assert pair.reader.of(messages.StepTokens) == []


def test_an_aborted_choice_stays_so_when_the_handoff_is_lost_and_resumed(pair: EnginePair) -> None:
    pair.lands_reads = False
    pair.submit(1, make_generation(PROMPT, 6, num_choices=2))
    while not pair.fabric.pending:
        pair.turn()
    abort(pair.reader, 0)
    pair.fabric.pending[0].end(TransferState.FAILED, DeadlineError("the read did not end in time"))
    pair.turn()
    pair.reader.the(messages.HandoffLost)
    pair.reader.engine.handle(messages.Resume(1, (ChoiceState(0), ChoiceState(1))))
    pair.lands_reads = True
    pair.run()
    assert pair.reader.tokens(1, 0) == []
    assert pair.reader.tokens(1, 1) == continuation(PROMPT, 6)
