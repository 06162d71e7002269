"""One engine that computes everything itself: answers against hand computation, limits, ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_rig import EngineRig, make_generation, prompt_of
from fake_runner import continuation

from kvrelay_core.request import ChoiceState, FinishReason, Usage
from kvrelay_engine import messages


@pytest.fixture
def rigs() -> Iterator[list[EngineRig]]:
    """Engines that a test made; each must be empty at the end."""
    made: list[EngineRig] = []
    yield made
    for rig in made:
        rig.check_empty()
        rig.close()


@pytest.fixture
def rig(rigs: list[EngineRig]) -> EngineRig:
    return make_rig(rigs)


def make_rig(rigs: list[EngineRig], **changes: Any) -> EngineRig:
    rig = EngineRig(**changes)
    rigs.append(rig)
    return rig


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("max_batched_tokens", [8, 13, 64])
def test_decode_alone_is_exact_for_every_length_and_chunk_size(
    rigs: list[EngineRig], length: int, max_batched_tokens: int
) -> None:
    rig = make_rig(rigs, max_batched_tokens=max_batched_tokens)
    prompt = prompt_of(length)
    rig.decode(1, make_generation(prompt, 11))
    rig.run()
    assert rig.tokens(1) == continuation(prompt, 11)
    assert rig.finish(1) == messages.ChoiceFinished(1, 0, FinishReason.LENGTH, 11)
    assert rig.runner.batches[0] == [min(length, max_batched_tokens)]


def test_a_full_batch_is_exact_and_one_message_a_step(rig: EngineRig) -> None:
    prompts = [prompt_of(3 + 5 * index, index) for index in range(8)]
    for index, prompt in enumerate(prompts):
        rig.decode(index, make_generation(prompt, 9))
    rig.run()
    for index, prompt in enumerate(prompts):
        assert rig.tokens(index) == continuation(prompt, 9)
    assert max(len(event.ids) for event in rig.of(messages.StepTokens)) > 4
    assert len(rig.of(messages.StepTokens)) <= rig.load().steps


def test_more_requests_than_seats_wait_their_turn(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, max_num_seqs=2)
    for index in range(5):
        rig.decode(index, make_generation(prompt_of(6, index), 4))
    rig.step()
    assert (rig.load().requests_running, rig.load().requests_waiting) == (2, 3)
    rig.run()
    for index in range(5):
        assert rig.tokens(index) == continuation(prompt_of(6, index), 4)


def test_prefix_hits_leave_one_token_and_do_not_change_the_answer(rig: EngineRig) -> None:
    prompt = prompt_of(16)
    rig.prefill(1, make_generation(prompt))
    rig.run()
    rig.prefill(2, make_generation(prompt))
    rig.run()
    cold, warm = rig.of(messages.PrefillFinished)
    assert (cold.usage.cached_tokens, warm.usage.cached_tokens) == (0, 12)
    assert cold.first_tokens == warm.first_tokens
    assert [first.token_id for first in warm.first_tokens] == continuation(prompt, 1)
    assert [event.cached_tokens for event in rig.of(messages.Accepted)] == [0, 12]
    assert rig.runner.batches[-1] == [4]


def test_hits_are_rounded_down_to_whole_hash_units(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, block_tokens=4, hash_unit_tokens=16)
    for request_id, length in ((1, 40), (2, 33), (3, 32)):
        rig.prefill(request_id, make_generation(prompt_of(length)))
        rig.run()
    assert [event.usage.cached_tokens for event in rig.of(messages.PrefillFinished)] == [0, 32, 16]


def test_a_unit_that_is_cached_in_part_is_no_hit(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, block_tokens=4, hash_unit_tokens=16, kv_blocks=10)
    # The second takes the two blocks that were freed first: the partial one and the last full one.
    for request_id, prompt in enumerate((prompt_of(33), [1, 2, 3, 4, 5], prompt_of(33))):
        rig.prefill(request_id, make_generation(prompt))
        rig.run()
    finished = rig.of(messages.PrefillFinished)
    assert [event.usage.cached_tokens for event in finished] == [0, 0, 16]
    assert finished[2].first_tokens == finished[0].first_tokens


def test_another_tenant_does_not_hit(rig: EngineRig) -> None:
    for request_id, salt in ((1, "a"), (2, "b"), (3, "a")):
        rig.prefill(request_id, make_generation(prompt_of(20), cache_salt=salt))
        rig.run()
    assert [event.usage.cached_tokens for event in rig.of(messages.PrefillFinished)] == [0, 0, 16]


def test_blocks_filled_by_decoding_are_hits_too(rig: EngineRig) -> None:
    prompt = prompt_of(8)
    rig.decode(1, make_generation(prompt, 12))
    rig.run()
    rig.prefill(2, make_generation(prompt + rig.tokens(1)))
    rig.run()
    assert rig.the(messages.PrefillFinished).usage.cached_tokens == 16


def test_committed_tokens_are_input(rig: EngineRig) -> None:
    prompt, answer = prompt_of(7), continuation(prompt_of(7), 10)
    rig.decode(1, make_generation(prompt, 10, committed=tuple(answer[:4])))
    rig.prefill(2, make_generation(prompt, 10, committed=tuple(answer[:9])))
    rig.run()
    assert rig.tokens(1) == answer[4:]
    assert rig.of(messages.StepTokens)[0].positions[0] == 4
    assert rig.finish(1).num_tokens == 10
    (first,) = rig.the(messages.PrefillFinished).first_tokens
    assert (first.position, first.token_id, first.finish_reason) == (9, answer[9], FinishReason.LENGTH)


@pytest.mark.parametrize("length", [5, 8])
def test_choices_share_full_blocks_and_copy_the_partial_one(rig: EngineRig, length: int) -> None:
    prompt = prompt_of(length)
    rig.decode(1, make_generation(prompt, 6, num_choices=3))
    rig.step()
    assert rig.runner.num_copies == (2 if length % 4 else 0)
    assert rig.load().blocks_in_use == (length // 4 + 3 if length % 4 else length // 4)
    rig.run()
    for choice in range(3):
        assert rig.tokens(1, choice) == continuation(prompt, 6)
        assert rig.finish(1, choice).num_tokens == 6


def test_sampled_choices_differ_and_do_not_depend_on_the_batch(rigs: list[EngineRig]) -> None:
    together, alone = make_rig(rigs), make_rig(rigs)
    generation = make_generation(prompt_of(9), 8, num_choices=3, temperature=2.0)
    together.decode(1, generation)
    together.decode(2, make_generation(prompt_of(5), 8))
    together.run()
    answers = [together.tokens(1, choice) for choice in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    alone.decode(1, generation)
    alone.run()
    assert [alone.tokens(1, choice) for choice in range(3)] == answers


def test_a_branch_without_a_free_block_recomputes_the_partial_block(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, kv_blocks=5)
    prompt = prompt_of(13)  # all four blocks
    rig.decode(1, make_generation(prompt, 2, num_choices=2))
    rig.run()
    assert rig.runner.num_copies == 0
    assert [rig.tokens(1, choice) for choice in range(2)] == [continuation(prompt, 2)] * 2


def test_prefill_says_queued_then_accepted_then_finished(rig: EngineRig) -> None:
    rig.prefill(1, make_generation(prompt_of(40), 5, num_choices=2))
    rig.run()
    rig.prefill(2, make_generation(prompt_of(40, 2)))
    rig.run()
    of_first = [event for event in rig.events if getattr(event, "id", None) == 1]
    assert [type(event) for event in of_first] == [messages.Queued, messages.Accepted, messages.PrefillFinished]
    assert rig.of(messages.Accepted)[0].ticket is None
    finished = rig.of(messages.PrefillFinished)[0]
    assert [first.choice for first in finished.first_tokens] == [0, 1]
    assert finished.usage == Usage(40, 0, 2)


def test_the_estimate_follows_the_measured_speed(rig: EngineRig) -> None:
    def slow_run(batch: Any) -> Any:
        rig.clock.advance(0.5)
        return run(batch)

    run, rig.runner.run = rig.runner.run, slow_run  # type: ignore[method-assign]
    rig.prefill(1, make_generation(prompt_of(16)))
    rig.run()
    rig.prefill(2, make_generation(prompt_of(32, 2)))
    rig.prefill(3, make_generation(prompt_of(16, 3)))
    assert [event.eta_s for event in rig.of(messages.Queued)] == pytest.approx([0.0, 1.0, 1.5])
    rig.run()


# ------------------------------------------------------------------------------------- stop conditions


def test_a_stop_token_ends_the_choice(rig: EngineRig) -> None:
    prompt = prompt_of(6)
    answer = continuation(prompt, 30)
    stop = answer[4]
    length = answer.index(stop) + 1
    rig.decode(1, make_generation(prompt, 30, stop_token_ids=(stop,)))
    rig.decode(2, make_generation(prompt, 30, eos_token_ids=(stop,)))
    rig.decode(3, make_generation(prompt, 12, eos_token_ids=(stop,), ignore_eos=True))
    rig.run()
    for request_id in (1, 2):
        assert rig.tokens(request_id) == answer[:length]
        assert rig.finish(request_id) == messages.ChoiceFinished(request_id, 0, FinishReason.STOP, length, stop)
    assert rig.finish(3) == messages.ChoiceFinished(3, 0, FinishReason.LENGTH, 12)


def test_the_context_limit_ends_a_choice(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, max_model_len=20)
    rig.decode(1, make_generation(prompt_of(15), 100))
    rig.run()
    assert rig.finish(1) == messages.ChoiceFinished(1, 0, FinishReason.LENGTH, 5)


def test_prefill_judges_its_first_token(rig: EngineRig) -> None:
    (token,) = continuation(prompt_of(6), 1)
    rig.prefill(1, make_generation(prompt_of(6), 9, eos_token_ids=(token,)))
    rig.prefill(2, make_generation(prompt_of(6), 1))
    rig.prefill(3, make_generation(prompt_of(6), 9))
    rig.run()
    reasons = [event.first_tokens[0].finish_reason for event in rig.of(messages.PrefillFinished)]
    assert reasons == [FinishReason.STOP, FinishReason.LENGTH, None]


# ----------------------------------------------------------------------------------------------- ends


def test_impossible_requests_are_refused_at_once_with_the_numbers(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, kv_blocks=11, max_pinned_share=0.5, max_model_len=30)
    cases = [
        (make_generation([]), "InvalidRequestError", "empty"),
        (make_generation([5, 97]), "InvalidRequestError", "[0, 97)"),
        (make_generation(prompt_of(41)), "PoolExhaustedError", "needs 11 KV blocks, the whole pool has 10"),
        (make_generation(prompt_of(30)), "InvalidRequestError", "at most 30"),
        (make_generation([1], num_choices=9), "InvalidRequestError", "max_num_seqs is 8"),
        (make_generation([1], 2, committed=(3, 4)), "InvalidRequestError", "nothing is left"),
        (make_generation([1], 4, num_choices=2, committed=(3,)), "InvalidRequestError", "committed"),
    ]
    for request_id, (generation, _, _) in enumerate(cases):
        rig.decode(request_id, generation)
    rig.prefill(99, make_generation(prompt_of(21)), handoff=True)
    for request_id, (_, reason, text) in enumerate(cases):
        assert rig.error(request_id) == reason
        assert text in rig.of(messages.RequestFailed)[request_id].error.message
    assert rig.error(99) == "PoolExhaustedError"
    assert "needs 6 KV blocks, tickets may pin 5" in rig.of(messages.RequestFailed)[-1].error.message


def test_a_draining_engine_refuses_new_requests_and_ends_its_own(rig: EngineRig) -> None:
    rig.decode(1, make_generation(prompt_of(6), 5))
    rig.engine.handle(messages.Drain())
    rig.decode(2, make_generation(prompt_of(6), 5))
    rig.run()
    assert rig.tokens(1) == continuation(prompt_of(6), 5)
    assert rig.error(2) == "DrainingError"


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("num_choices", [1, 3])
def test_abort_frees_everything_at_every_step(rig: EngineRig, num_steps: int, num_choices: int) -> None:
    rig.decode(1, make_generation(prompt_of(40), 9, num_choices=num_choices))
    rig.prefill(2, make_generation(prompt_of(40, 2), num_choices=num_choices))
    for _ in range(num_steps):
        rig.step()
    rig.abort(1)
    rig.abort(2)
    rig.abort(1)
    rig.abort(77)
    rig.check_empty()


def test_a_deadline_passes(rig: EngineRig) -> None:
    rig.decode(1, make_generation(prompt_of(5), 50, deadline_s=0.0105))
    rig.run()
    assert rig.error(1) == "DeadlineError"
    assert 5 < len(rig.tokens(1)) < 50


def test_a_failed_step_fails_its_requests_and_no_others(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, max_num_seqs=2)
    for request_id in range(3):
        rig.decode(request_id, make_generation(prompt_of(8, request_id), 5))
    rig.runner.failure = RuntimeError("the device is gone")
    rig.run()
    assert [rig.error(request_id) for request_id in (0, 1)] == ["InternalError"] * 2
    assert rig.tokens(2) == continuation(prompt_of(8, 2), 5)
    rig.decode(3, make_generation(prompt_of(9), 5))  # the blocks of the failed step are no hits
    rig.run()
    assert rig.tokens(3) == continuation(prompt_of(9), 5)


def test_logits_that_are_not_numbers_end_their_request_and_no_other(rig: EngineRig) -> None:
    rig.decode(1, make_generation(prompt_of(12, 1), 6))
    rig.decode(2, make_generation(prompt_of(12, 2), 6, num_choices=2))
    while len(rig.tokens(2)) < 2:
        rig.step()
    rig.runner.broken_rows = {2}  # the second choice of request 2
    rig.run()
    assert rig.error(2) == "InternalError"
    assert rig.tokens(1) == continuation(prompt_of(12, 1), 6)
    assert rig.tokens(2) == continuation(prompt_of(12, 2), 2), "nothing was made up"
    rig.prefill(3, make_generation(prompt_of(12, 2)))
    rig.run()
    assert rig.the(messages.PrefillFinished).usage.cached_tokens == 0, "its KV may be damaged too"


def test_a_prefill_whose_logits_are_not_numbers_fails_and_frees_its_ticket(rigs: list[EngineRig]) -> None:
    rig = make_rig(rigs, role="prefill")
    rig.runner.broken_rows = {0}
    rig.prefill(1, make_generation(prompt_of(12)), handoff=True)
    rig.run()
    assert rig.error(1) == "InternalError"
    assert not rig.of(messages.PrefillFinished)
    assert rig.load().blocks_cached == 0


def test_a_block_that_was_given_away_during_the_step_does_not_count(rig: EngineRig) -> None:
    def run_and_reuse(batch: Any) -> Any:
        rig.memory.words.bump(batch[0].block_table[1])
        return run(batch)

    run, rig.runner.run = rig.runner.run, run_and_reuse  # type: ignore[method-assign]
    rig.prefill(1, make_generation(prompt_of(12)))
    rig.run()
    assert rig.error(1) == "InternalError"
    rig.runner.run = run  # type: ignore[method-assign]
    rig.prefill(2, make_generation(prompt_of(12)))
    rig.run()
    assert rig.the(messages.PrefillFinished).usage.cached_tokens == 0


def test_an_engine_whose_pool_is_unsound_does_not_go_on() -> None:
    rig = EngineRig()
    rig.decode(1, make_generation(prompt_of(5)))
    rig.step()
    (sequence,) = rig.engine.scheduler.running
    rig.pool.release(sequence.blocks[:1])
    rig.runner.failure = RuntimeError("the device is gone")
    with pytest.raises(AssertionError, match="released more often than taken"):
        rig.step()


def test_two_requests_with_one_id_are_a_bug_that_leaves_nothing(rig: EngineRig) -> None:
    rig.decode(1, make_generation(prompt_of(5)))
    rig.decode(1, make_generation(prompt_of(5)))
    assert rig.error(1) == "InternalError"


def test_a_beat_tells_the_load(rig: EngineRig) -> None:
    rig.decode(1, make_generation(prompt_of(8), 50))
    rig.step()
    rig.engine.beat()
    load = rig.the(messages.Beat).load
    assert (load.requests_running, load.blocks_in_use, load.blocks_total, load.steps) == (1, 2, 63, 1)
    rig.abort(1)


def test_stray_resume_changes_nothing(rig: EngineRig) -> None:
    rig.decode(1, make_generation(prompt_of(8), 5))
    rig.step()
    rig.engine.handle(messages.Resume(1, (ChoiceState(0, (1, 2)),)))
    rig.engine.handle(messages.Resume(9, (ChoiceState(0),)))
    rig.run()
    assert rig.tokens(1) == continuation(prompt_of(8), 5)
