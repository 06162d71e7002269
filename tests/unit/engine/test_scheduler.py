"""Order, budget, preemption and room: who runs, and who gives way."""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from typing import Any

import pytest
from engine_rig import EnginePair, EngineRig, make_generation, prompt_of
from fake_runner import continuation

from kvrelay_core.request import Slo
from kvrelay_engine import messages
from kvrelay_engine.sequence import SequenceState


@pytest.fixture
def rigs() -> Iterator[list[EngineRig | EnginePair]]:
    made: list[EngineRig | EnginePair] = []
    yield made
    for rig in made:
        rig.check_empty()
        rig.close()


def make_rig(rigs: list[EngineRig | EnginePair], **changes: Any) -> EngineRig:
    rig = EngineRig(**changes)
    rigs.append(rig)
    return rig


def running(rig: EngineRig) -> list[int]:
    return [sequence.request.id for sequence in rig.engine.scheduler.running]


# ----------------------------------------------------------------------------------------- order, budget


def test_decoding_goes_first_and_prompts_take_the_rest_of_the_budget(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, max_batched_tokens=10)
    rig.decode(1, make_generation(prompt_of(4), 20))
    rig.decode(2, make_generation(prompt_of(4, 2), 20))
    rig.step()
    rig.decode(3, make_generation(prompt_of(30, 3), 20))
    for _ in range(5):
        rig.step()
    assert rig.runner.batches == [[4, 4], [1, 1, 8], [1, 1, 8], [1, 1, 8], [1, 1, 6], [1, 1, 1]]
    rig.run()


def test_several_prompts_share_a_step(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, max_batched_tokens=16)
    for request_id in range(3):
        rig.prefill(request_id, make_generation(prompt_of(10, request_id)))
    rig.run()
    assert rig.runner.batches == [[10, 6], [4, 10]]


def test_the_least_slack_goes_first_then_priority_then_arrival(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, max_num_seqs=1, max_batched_tokens=64)
    rig.prefill(0, make_generation(prompt_of(4)))
    rig.step()
    requests: list[dict[str, Any]] = [
        {"deadline_s": None}, {"deadline_s": None}, {"deadline_s": None, "priority": 5}, {"deadline_s": 9.0},
        {"deadline_s": 7.0},
    ]  # fmt: skip
    for request_id, extra in enumerate(requests, 1):
        rig.prefill(request_id, make_generation(prompt_of(8, request_id), **extra))
        rig.clock.advance(0.1)
    rig.run()
    assert [event.id for event in rig.of(messages.PrefillFinished)] == [0, 5, 4, 3, 1, 2]


def test_a_long_prompt_has_less_slack_than_a_short_one(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, max_num_seqs=1, max_batched_tokens=64)

    def slow_run(batch: Any) -> Any:
        rig.clock.advance(0.01 * sum(len(row.token_ids) for row in batch))
        return run(batch)

    run, rig.runner.run = rig.runner.run, slow_run  # type: ignore[method-assign]
    rig.prefill(0, make_generation(prompt_of(10)))
    rig.step()
    rig.prefill(1, make_generation(prompt_of(5, 1), deadline_s=5.0))
    rig.prefill(2, make_generation(prompt_of(60, 2), deadline_s=5.2))
    rig.run()
    assert [event.id for event in rig.of(messages.PrefillFinished)] == [0, 2, 1]


def test_the_promised_first_token_counts_as_a_deadline_until_it_is_there(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, max_num_seqs=1, max_batched_tokens=64)
    rig.prefill(0, make_generation(prompt_of(4)))
    rig.step()
    requests: list[dict[str, Any]] = [
        {"deadline_s": 7.0}, {"slo": Slo(ttft_s=5.0)}, {"slo": Slo(ttft_s=9.0), "deadline_s": 3.0},
        {"slo": Slo(ttft_s=1.0), "committed": (7,)}, {"slo": Slo(itl_s=0.01)},
    ]  # fmt: skip
    for request_id, extra in enumerate(requests, 1):
        rig.prefill(request_id, make_generation(prompt_of(8, request_id), **extra))
    rig.run()
    assert [event.id for event in rig.of(messages.PrefillFinished)] == [0, 3, 2, 1, 4, 5]


def test_a_missed_promise_fails_nothing_and_starves_nobody(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, max_num_seqs=1, patience_s=30.0)
    rig.decode(1, make_generation(prompt_of(4), 100))
    rig.step()
    rig.prefill(2, make_generation(prompt_of(8)))
    rig.clock.advance(31)
    rig.prefill(3, make_generation(prompt_of(8), slo=Slo(ttft_s=0.0)))
    rig.abort(1)
    rig.run()
    assert [event.id for event in rig.of(messages.PrefillFinished)] == [2, 3]


def test_times_that_are_no_numbers_are_refused(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs)
    rig.prefill(1, make_generation(prompt_of(4), slo=Slo(ttft_s=nan)))
    rig.prefill(2, make_generation(prompt_of(4), deadline_s=nan))
    assert [event.error.reason for event in rig.of(messages.RequestFailed)] == ["InvalidRequestError"] * 2


def test_patience_beats_deadlines(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, max_num_seqs=1, patience_s=30.0)
    rig.decode(1, make_generation(prompt_of(4), 100))
    rig.step()
    rig.prefill(2, make_generation(prompt_of(8)))
    rig.clock.advance(31)
    rig.prefill(3, make_generation(prompt_of(8), deadline_s=1.0))
    rig.abort(1)
    rig.run()
    assert [event.id for event in rig.of(messages.PrefillFinished)] == [2, 3]


def test_a_big_newcomer_is_not_overtaken_for_ever(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, kv_blocks=13, max_num_seqs=4)
    rig.decode(1, make_generation(prompt_of(16), 12))
    rig.step()
    rig.decode(2, make_generation(prompt_of(40, 2), 4))  # 10 blocks: not now
    rig.decode(3, make_generation(prompt_of(4, 3), 4))  # 1 block: would fit
    rig.step()
    assert running(rig) == [1]
    rig.run()
    assert rig.tokens(2) == continuation(prompt_of(40, 2), 4)


# ------------------------------------------------------------------------------------------- preemption


def test_preempted_sequences_are_recomputed_and_exact(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, kv_blocks=13, max_num_seqs=6)
    for request_id in range(6):
        rig.decode(request_id, make_generation(prompt_of(5, request_id), 20))
    preempted = 0
    while rig.step():
        preempted += sum(sequence.num_recomputes for sequence in rig.engine.scheduler.waiting)
        rig.engine.load.check_integrity()
    assert preempted > 0
    for request_id in range(6):
        assert rig.tokens(request_id) == continuation(prompt_of(5, request_id), 20)


def test_the_latest_without_deadline_gives_way(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, kv_blocks=10, max_num_seqs=3, max_batched_tokens=32)
    rig.decode(1, make_generation(prompt_of(7, 1), 20))
    rig.decode(2, make_generation(prompt_of(7, 2), 20))
    rig.decode(3, make_generation(prompt_of(7, 3), 20, deadline_s=50))
    while not any(sequence.num_recomputes for sequence in rig.engine.scheduler.waiting):
        assert rig.step()
    assert [sequence.request.id for sequence in rig.engine.scheduler.waiting] == [2]
    rig.run()


def test_too_long_to_recompute_is_handed_back(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, kv_blocks=8, max_num_seqs=2, decode_alone_tokens=10)
    rig.decode(1, make_generation(prompt_of(11, 1), 8))
    rig.decode(2, make_generation(prompt_of(11, 2), 8, num_choices=1))
    rig.run()
    back = rig.the(messages.HandedBack)
    assert (back.id, back.error.reason) == (2, "OverloadedError")
    kept = rig.tokens(2)
    assert kept == continuation(prompt_of(11, 2), len(kept))
    assert [event.id for event in rig.of(messages.ChoiceFinished)] == [1]
    assert rig.tokens(1) == continuation(prompt_of(11, 1), 8)


@pytest.mark.parametrize("kv_blocks", [11, 12, 13])
def test_all_choices_of_a_request_go_back_together_and_no_other_request_with_them(
    rigs: list[EngineRig | EnginePair], kv_blocks: int
) -> None:
    """Also when some of the choices have a row in the step already."""
    rig = make_rig(rigs, kv_blocks=kv_blocks, max_num_seqs=4, decode_alone_tokens=0)
    rig.decode(1, make_generation(prompt_of(9, 1), 24, num_choices=3))
    rig.decode(2, make_generation(prompt_of(3, 2), 24, deadline_s=60))
    rig.run()
    assert rig.the(messages.HandedBack).id == 1
    assert [event.id for event in rig.of(messages.ChoiceFinished)] == [2]
    assert rig.tokens(2) == continuation(prompt_of(3, 2), 24)


def test_the_recompute_cap_hands_the_rest_back(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, kv_blocks=10, max_num_seqs=4, recompute_tokens=12)
    for request_id in range(4):
        rig.decode(request_id, make_generation(prompt_of(7, request_id), 20))
    rig.run()
    back = [event.id for event in rig.of(messages.HandedBack)]
    assert back
    finished = {event.id for event in rig.of(messages.ChoiceFinished)}
    assert finished == set(range(4)) - set(back)
    for request_id in finished:
        assert rig.tokens(request_id) == continuation(prompt_of(7, request_id), 20)


def test_a_sequence_alone_may_use_the_whole_pool(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, kv_blocks=6, decode_alone_tokens=0)
    rig.decode(1, make_generation(prompt_of(3), 500))
    rig.run()
    assert rig.tokens(1) == continuation(prompt_of(3), 17)


def test_blocks_of_an_accepted_ticket_are_never_taken(rigs: list[EngineRig | EnginePair]) -> None:
    """Decoding sequences grow, and preempt each other, around a prompt that is still being computed."""
    rig = make_rig(rigs, role="prefill", kv_blocks=13, max_num_seqs=4, max_batched_tokens=4)
    for request_id in (2, 3):
        rig.decode(request_id, make_generation(prompt_of(3, request_id), 13))
    rig.step()
    rig.step()
    rig.prefill(1, make_generation(prompt_of(32, 1)), handoff=True)
    preempted = False
    while not rig.of(messages.PrefillFinished):
        assert rig.step()
        preempted |= any(sequence.num_recomputes for sequence in rig.engine.scheduler.waiting)
    assert preempted
    ticket = rig.the(messages.Accepted).ticket
    assert ticket is not None
    (group,) = ticket.groups
    assert tuple(rig.pool.word(block) for block in group.blocks) == group.words
    assert rig.the(messages.PrefillFinished).first_tokens[0].token_id == continuation(prompt_of(32, 1), 1)[0]
    rig.run()
    for request_id in (2, 3):
        assert rig.tokens(request_id) == continuation(prompt_of(3, request_id), 13)
    rig.abort(1)


# --------------------------------------------------------------------------------------- room for hand-offs


def test_a_handoff_leaves_room_for_the_growth_of_others(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, kv_blocks=9, max_num_seqs=8)
    for request_id in range(2):
        rig.decode(request_id, make_generation(prompt_of(6, request_id), 90))
    rig.step()
    remote = EngineRig()
    remote.prefill(9, make_generation(prompt_of(6)))
    (newcomer,) = remote.engine.scheduler.waiting
    remote.abort(9)
    remote.close()
    scheduler = rig.engine.scheduler
    scheduler.add_remote(newcomer)
    assert rig.pool.num_free == 4
    assert scheduler.reserve_remote(newcomer, 3) is None
    blocks = scheduler.reserve_remote(newcomer, 2)
    assert blocks is not None
    newcomer.blocks = blocks
    scheduler.remove(newcomer)
    assert newcomer.state is SequenceState.FINISHED
    for request_id in range(2):
        rig.abort(request_id)


def test_a_handoff_does_not_overtake_a_preempted_sequence(rigs: list[EngineRig | EnginePair]) -> None:
    pair = EnginePair(decode={"kv_blocks": 8, "max_num_seqs": 3})
    rigs.append(pair)
    for request_id in range(2):
        pair.submit(request_id, make_generation(prompt_of(7, request_id), 20))
    while not pair.reader.engine.scheduler.waiting:
        assert pair.turn()
    pair.submit(2, make_generation(prompt_of(2, 2), 9))
    for _ in range(6):
        pair.turn()
        assert [sequence.request.id for sequence in pair.reader.engine.scheduler.running] == [0]
    pair.run()
    for request_id, length, num_tokens in ((0, 7, 20), (1, 7, 20), (2, 2, 9)):
        assert pair.answer(request_id) == continuation(prompt_of(length, request_id), num_tokens)


def test_a_shared_prefix_is_pinned_once(rigs: list[EngineRig | EnginePair]) -> None:
    """Tickets of one long prefix fit under the cap as long as what they have of their own does (PROTOCOL B5)."""
    rig = make_rig(rigs, role="prefill", kv_blocks=41, max_pinned_share=0.5, max_batched_tokens=64)  # 20 blocks
    prefix = prompt_of(64)  # 16 blocks
    rig.prefill(1, make_generation([*prefix, 1]), handoff=True)
    rig.run()
    for request_id in (2, 3, 4, 5):
        rig.prefill(request_id, make_generation([*prefix, request_id]), handoff=True)
    rig.run()
    assert [event.id for event in rig.of(messages.Accepted)] == [1, 2, 3, 4]
    assert rig.load().blocks_pinned == 20
    for request_id in (1, 2, 3, 4, 5):
        rig.abort(request_id)


def test_a_prefix_that_newcomers_of_one_step_share_is_pinned_once(rigs: list[EngineRig | EnginePair]) -> None:
    rig = make_rig(rigs, role="prefill", kv_blocks=41, max_pinned_share=0.5, max_batched_tokens=64)
    prefix = prompt_of(64)
    rig.prefill(1, make_generation([*prefix, 1]))  # no ticket: cached, not pinned
    rig.run()
    for request_id in (2, 3, 4, 5, 6):
        rig.prefill(request_id, make_generation([*prefix, request_id]), handoff=True)
    rig.step()
    assert [event.id for event in rig.of(messages.Accepted)] == [1, 2, 3, 4, 5]
    assert rig.load().blocks_pinned == 20
    for request_id in (2, 3, 4, 5, 6):
        rig.abort(request_id)
