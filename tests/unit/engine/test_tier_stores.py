"""What an engine computed is in the tiers afterwards: all of it, once, and nothing that its blocks held later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_rig import EnginePair, make_generation, prompt_of
from engine_tiers import CHUNK_TOKENS, LastingStore, TieredRig, tiers_over
from fake_runner import continuation

from kvrelay_engine.messages import PrefillFinished

PROMPT = prompt_of(5 * CHUNK_TOKENS + 3)


@pytest.fixture
def store() -> LastingStore:
    return LastingStore()


@pytest.fixture
def rig(store: LastingStore) -> Iterator[TieredRig]:
    rig = TieredRig(store)
    yield rig
    rig.close()


def test_prefill_stores_every_chunk_of_a_prompt_that_is_full(rig: TieredRig, store: LastingStore) -> None:
    rig.prefill(1, make_generation(PROMPT))
    rig.settle()
    assert store.usage().num_parts == 5
    assert rig.counts("host")["written"] == rig.counts("fake")["written"] == 5
    rig.check()


def test_what_is_stored_is_not_offered_again(rig: TieredRig, store: LastingStore) -> None:
    for number in (1, 2):
        rig.prefill(number, make_generation(PROMPT))
        rig.settle()
    assert rig.engine.load.report(0).prefix_blocks_pulled == 0
    rig.pool.clear_cache()  # the next one is computed where the tiers have it in part
    rig.prefill(3, make_generation([*PROMPT, *prompt_of(2 * CHUNK_TOKENS, seed=5)]))
    rig.settle()
    assert rig.counts("fake")["written"] == 7 == store.usage().num_parts
    rig.check()


def test_decode_stores_what_it_generates(store: LastingStore) -> None:
    rig = TieredRig(store, role="decode")
    rig.decode(1, make_generation(PROMPT, max_tokens=3 * CHUNK_TOKENS))
    rig.settle()
    answer = rig.tokens(1)
    assert answer == continuation(PROMPT, 3 * CHUNK_TOKENS)
    other = TieredRig(store)
    other.prefill(1, make_generation([*PROMPT, *answer, 1, 2, 3]))
    other.settle()
    assert other.loads.num_loaded_blocks == 8 * 2, "the prompt, the answer, and not the last token that nobody computed"
    for one in (rig, other):
        one.check()
        one.close()


def test_decode_does_not_store_what_came_by_a_hand_off(store: LastingStore) -> None:
    pair = EnginePair(decode={"make_tiers": tiers_over(store)})
    pair.submit(1, make_generation(PROMPT, max_tokens=2 * CHUNK_TOKENS))
    pair.run()
    assert pair.reader.tiers is not None and pair.reader.tiers.chain.drain(timeout_s=20)
    assert pair.answer(1) == continuation(PROMPT, 2 * CHUNK_TOKENS)
    assert store.usage().num_parts == 2, "the chunk that the prompt began, and the next"
    pair.check_empty()
    pair.close()


def test_every_choice_is_stored(store: LastingStore) -> None:
    rig = TieredRig(store, role="decode")
    rig.decode(1, make_generation(PROMPT, max_tokens=2 * CHUNK_TOKENS, num_choices=2, temperature=5.0))
    rig.settle()
    assert rig.tokens(1, 0) != rig.tokens(1, 1)
    assert store.usage().num_parts == 5 + 2 * 2
    rig.check()
    rig.close()


def test_a_block_that_is_reused_before_the_copy_reaches_no_tier(rig: TieredRig, store: LastingStore) -> None:
    rig.gates.leaving.shut()
    rig.prefill(1, make_generation(PROMPT))
    rig.compute()
    blocks = rig.pool.reserve(rig.pool.num_free)  # all that was computed is given to others,
    rig.memory.tensor[blocks] = 77.0  # who write there,
    rig.gates.leaving.open()  # and only now the copies begin
    assert rig.chain.drain(timeout_s=20)
    assert rig.counts("host")["stale"] == 5 and rig.counts("host")["written"] == 0
    assert store.usage().num_parts == 0
    rig.pool.release(blocks)
    rig.check()


def test_a_full_queue_drops_the_newest_and_costs_no_answer(rig: TieredRig, store: LastingStore) -> None:
    rig.gates.leaving.shut()
    long = prompt_of(31 * CHUNK_TOKENS)
    for number in range(1, 11):  # 31 chunks each, the queue has room for 256
        rig.prefill(number, make_generation([number, *long[1:]]))
        rig.compute()
    assert len(rig.of(PrefillFinished)) == 10
    assert rig.counts("host")["dropped"] > 0
    rig.gates.leaving.open()
    rig.settle()
    rig.check()


def test_what_a_broken_step_computed_is_not_stored(rig: TieredRig, store: LastingStore) -> None:
    rig.runner.failure = RuntimeError("half-way")
    rig.prefill(1, make_generation(PROMPT[: CHUNK_TOKENS + 1]))
    rig.compute()
    assert rig.error(1)
    assert rig.chain.drain(timeout_s=20)
    assert store.usage().num_parts == 0
    rig.check()
