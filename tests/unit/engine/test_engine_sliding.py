"""Engines with a sliding group: every token sees its window, tokens do not depend on who frees what when, and what is
held stays bounded.

The fake runner looks at all of each token's window through the sliding table, and notes what is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import EngineRig, make_generation, prompt_of
from fake_runner import continuation
from sliding_rig import drop, make_pair, make_rig

from kvrelay_engine import messages
from kvrelay_engine.sliding_blocks import most_while_computing, most_while_decoding


@pytest.fixture
def rigs() -> Iterator[list[EngineRig]]:
    made: list[EngineRig] = []
    yield made
    for rig in made:
        rig.check_empty()
        rig.close()


def keep(rigs: list[EngineRig], role: str = "decode", **changes: Any) -> EngineRig:
    rigs.append(make_rig(role, **changes))
    return rigs[-1]


def most_in_use(rig: EngineRig, max_steps: int = 5000) -> int:
    """Of the sliding group, while the rig computes all that it has to."""
    most = 0
    for _ in range(max_steps):
        busy = rig.step()
        assert rig.sliding is not None
        most = max(most, rig.sliding.pool.num_in_use)
        rig.load()
        if not busy:
            return most
    raise AssertionError("still computing")


# ------------------------------------------------------------------------------------------- bounded use


def test_a_long_prompt_and_its_answer_use_a_bounded_number_of_blocks(rigs: list[EngineRig]) -> None:
    rig = keep(rigs, max_model_len=2000)
    prompt = prompt_of(600)
    rig.decode(1, make_generation(prompt, 100))
    assert rig.sliding is not None
    bound = most_while_computing(rig.sliding.layout, 16)
    assert most_in_use(rig) <= bound == 7
    assert rig.tokens(1) == continuation(prompt, 100)


def test_decoding_uses_the_window_alone(rigs: list[EngineRig]) -> None:
    rig = keep(rigs)
    rig.decode(1, make_generation(prompt_of(100), 200))
    while not rig.of(messages.StepTokens):
        rig.step()
    assert rig.sliding is not None
    assert most_in_use(rig) <= most_while_decoding(rig.sliding.layout)


def test_prompts_that_are_computed_at_once_wait_for_each_others_room(rigs: list[EngineRig]) -> None:
    """Promises are kept: with room for one and a half, the second one waits, and nobody is preempted."""
    rig = keep(rigs, sliding_blocks=13)
    for request in range(4):
        rig.decode(request, make_generation(prompt_of(90, request), 20))
    assert most_in_use(rig) <= 12
    for request in range(4):
        assert rig.tokens(request) == continuation(prompt_of(90, request), 20)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(rigs: list[EngineRig]) -> None:
    rig = keep(rigs, sliding_blocks=13)
    rig.decode(1, make_generation(prompt_of(90), 20, num_choices=4))
    (failed,) = rig.of(messages.RequestFailed)
    assert failed.error.reason == "PoolExhaustedError" and "28 KV blocks" in failed.error.message


# ------------------------------------------------------------------------------------------ prefix cache


def prefill_again(rig: EngineRig, request: int, prompt: list[int]) -> int:
    """Cached tokens of a prompt."""
    rig.prefill(request, make_generation(prompt))
    rig.run()
    return next(event.cached_tokens for event in rig.of(messages.Accepted) if event.id == request)


def test_a_hit_needs_the_window_before_its_end(rigs: list[EngineRig]) -> None:
    rig = keep(rigs, "prefill")
    prompt = prompt_of(101)
    assert [prefill_again(rig, 1, prompt), prefill_again(rig, 2, prompt)] == [0, 100]
    assert prefill_again(rig, 3, [*prompt[:50], *prompt_of(50, 9)]) == 48


@pytest.mark.parametrize(
    ("lost", "hit"), [((24,), 96), ((22,), 88), ((22, 23), 88), ((21,), 100), ((0, 1), 100), ((23, 19), 92)]
)
def test_a_hit_ends_where_the_window_is_whole(rigs: list[EngineRig], lost: tuple[int, ...], hit: int) -> None:
    """Blocks of the sliding group alone were evicted; a window of 10 spans up to four of them."""
    rig = keep(rigs, "prefill")
    prompt = prompt_of(101)
    prefill_again(rig, 1, prompt)
    drop(rig, prompt, lost)
    assert prefill_again(rig, 2, prompt) == hit


def test_evicted_windows_cost_computing_and_never_a_token(rigs: list[EngineRig]) -> None:
    """The sliding group's cache is small: long prompts evict each other's blocks there, and not in the full group."""
    rig = keep(rigs, sliding_blocks=20, kv_blocks=1000)
    prompts = [prompt_of(150, seed) for seed in range(4)]
    for request in range(12):
        prompt = prompts[request % 4][: 150 - 13 * (request // 4)]
        rig.decode(request, make_generation(prompt, 9))
        rig.run()
        assert rig.tokens(request) == continuation(prompt, 9)


def test_what_a_broken_request_left_is_not_found(rigs: list[EngineRig]) -> None:
    rig = keep(rigs, "prefill")
    prompt = prompt_of(101)
    rig.prefill(1, make_generation(prompt))
    for _ in range(6):
        rig.step()
    rig.runner.broken_rows = {0}
    rig.run()
    assert rig.error(1) == "InternalError"
    assert rig.sliding is not None and rig.sliding.pool.num_cached == 0
    assert prefill_again(rig, 2, prompt) == 0


# ----------------------------------------------------------------------------------- preemption, branches


def test_preempted_sequences_are_computed_again(rigs: list[EngineRig]) -> None:
    rig = keep(rigs, kv_blocks=60)
    for request in range(4):
        rig.decode(request, make_generation(prompt_of(40, request), 40))
    rig.run()
    for request in range(4):
        assert rig.tokens(request) == continuation(prompt_of(40, request), 40)
    assert sum(map(len, rig.runner.batches)) > 0


@pytest.mark.parametrize("length", [38, 40, 41])
def test_choices_share_the_window_and_part(rigs: list[EngineRig], length: int) -> None:
    rig = keep(rigs)
    prompt = prompt_of(length)
    rig.decode(1, make_generation(prompt, 30, num_choices=3))
    most_in_use(rig)
    for choice in range(3):
        assert rig.tokens(1, choice) == continuation(prompt, 30)


@pytest.mark.parametrize("length", [21, 22, 23, 24])
def test_a_choice_that_gets_no_block_is_computed_again(rigs: list[EngineRig], length: int) -> None:
    """What its partial block's tokens see was given back when the prompt was done: that block alone cannot be computed
    again."""
    rig = keep(rigs)
    taken = rig.pool.reserve(rig.pool.num_free - 6)
    rig.decode(1, make_generation(prompt_of(length), 8, num_choices=3))
    while not rig.of(messages.StepTokens):
        rig.step()
    rig.pool.release(taken)
    rig.run()
    for choice in range(3):
        assert rig.tokens(1, choice) == continuation(prompt_of(length), 8)


@pytest.mark.parametrize("length", [22, 24])
def test_a_choice_of_a_handoff_that_gets_no_block_is_computed_again(length: int) -> None:
    """Of what its tokens see a ticket names only what the one behind the prompt does."""
    pair = make_pair(decode_alone_tokens=1000)
    taken = pair.reader.pool.reserve(pair.reader.pool.num_free - 6)
    pair.submit(1, make_generation(prompt_of(length), 8, num_choices=3))
    while not pair.reader.of(messages.HandoffDone):
        pair.turn()
    pair.reader.pool.release(taken)
    pair.run()
    for choice in range(3):
        assert pair.answer(1, choice) == continuation(prompt_of(length), 8)
    pair.check_empty()
    pair.close()


def test_a_choice_that_gets_no_block_and_is_too_long_goes_back_with_its_request(rigs: list[EngineRig]) -> None:
    rig = keep(rigs, decode_alone_tokens=20)
    taken = rig.pool.reserve(rig.pool.num_free - 6)
    rig.decode(1, make_generation(prompt_of(22), 8, num_choices=2))
    rig.run()
    assert rig.the(messages.HandedBack).id == 1
    rig.pool.release(taken)


def test_an_abort_in_every_step_leaves_nothing(rigs: list[EngineRig]) -> None:
    rig = keep(rigs)
    for num_steps in range(1, 25):
        rig.decode(num_steps, make_generation(prompt_of(70, num_steps), 20, num_choices=2))
        for _ in range(num_steps):
            rig.step()
        rig.abort(num_steps)
        rig.check_empty()
