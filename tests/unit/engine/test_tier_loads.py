"""A prompt's beginning comes from the tiers where they have it; whatever they do, the answer is that of computing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_rig import make_generation, prompt_of
from engine_tiers import CHUNK_TOKENS, LastingStore, TieredRig
from fake_runner import continuation, next_token

from kvrelay_core.request import Slo
from kvrelay_engine.messages import Abort, PrefillFinished
from kvrelay_transfer.tiers.fake_store import Fault

PROMPT = prompt_of(5 * CHUNK_TOKENS + 3)
CHUNK_BLOCKS = 2


@pytest.fixture
def store() -> Iterator[LastingStore]:
    """With the KV of PROMPT, that a worker computed which is gone."""
    store = LastingStore()
    rig = TieredRig(store)
    rig.prefill(1, make_generation(PROMPT))
    rig.settle()
    rig.close()
    assert store.usage().num_parts == 5
    yield store
    store.release()


@pytest.fixture
def rig(store: LastingStore) -> Iterator[TieredRig]:
    """A worker that has just started."""
    rig = TieredRig(store)
    yield rig
    rig.close()


def answer(rig: TieredRig, request_id: int = 1) -> tuple[int, int]:
    """The first token of a prefill that has finished, and how many tokens were cached."""
    (finished,) = [event for event in rig.of(PrefillFinished) if event.id == request_id]
    return finished.first_tokens[0].token_id, finished.usage.cached_tokens


# -------------------------------------------------------------------------------------------- what is found


def test_an_empty_worker_loads_what_another_one_computed(rig: TieredRig) -> None:
    rig.prefill(1, make_generation(PROMPT))
    rig.settle()
    assert answer(rig) == (next_token(PROMPT), 5 * CHUNK_TOKENS)
    assert rig.runner.batches == [[3]], "only the rest was computed"
    assert rig.loads.num_loaded_blocks == 5 * CHUNK_BLOCKS
    rig.check()


def test_what_is_loaded_is_found_in_the_pool_afterwards(rig: TieredRig, store: LastingStore) -> None:
    for number in (1, 2):
        rig.prefill(number, make_generation(PROMPT))
        rig.settle()
    assert answer(rig, 2) == answer(rig, 1)
    assert store.calls["get"] == 5
    rig.check()


def test_what_the_pool_lost_comes_back_from_host_memory(rig: TieredRig, store: LastingStore) -> None:
    for number in (1, 2):
        rig.prefill(number, make_generation(PROMPT))
        rig.settle()
        rig.pool.clear_cache()
    assert answer(rig, 2) == (next_token(PROMPT), 5 * CHUNK_TOKENS)
    assert store.calls["get"] == 5 and rig.counts("host")["hits"] == 5
    rig.check()


def test_only_what_the_pool_lacks_is_loaded(rig: TieredRig, store: LastingStore) -> None:
    rig.prefill(1, make_generation(PROMPT[: 2 * CHUNK_TOKENS + 1]))
    rig.settle()
    rig.prefill(2, make_generation(PROMPT))
    rig.settle()
    assert store.calls["get"] == 5 and rig.loads.num_loaded_blocks == 5 * CHUNK_BLOCKS
    assert answer(rig, 2) == (next_token(PROMPT), 5 * CHUNK_TOKENS)
    rig.check()


def test_a_chunk_of_which_the_pool_has_some_is_loaded_whole(rig: TieredRig) -> None:
    rig.prefill(1, make_generation(PROMPT[: 3 * CHUNK_TOKENS // 2 + 1]))
    rig.settle()
    assert answer(rig)[1] == CHUNK_TOKENS
    rig.prefill(2, make_generation(PROMPT))
    rig.settle()
    assert answer(rig, 2) == (next_token(PROMPT), 5 * CHUNK_TOKENS)
    assert rig.loads.num_loaded_blocks == 5 * CHUNK_BLOCKS - 1, "one of them is kept as it was here"
    rig.check()


def test_the_last_token_is_always_left_to_compute(rig: TieredRig) -> None:
    """PROTOCOL A3: logits come from computing it."""
    rig.prefill(1, make_generation(PROMPT[: 5 * CHUNK_TOKENS]))
    rig.settle()
    assert answer(rig) == (next_token(PROMPT[: 5 * CHUNK_TOKENS]), 4 * CHUNK_TOKENS)
    rig.check()


def test_another_tenant_finds_nothing(rig: TieredRig) -> None:
    rig.prefill(1, make_generation(PROMPT, cache_salt="another tenant"))
    rig.settle()
    assert answer(rig) == (next_token(PROMPT), 0)
    rig.check()


def test_decode_loads_what_it_computes_alone(store: LastingStore) -> None:
    rig = TieredRig(store, role="decode")
    rig.decode(1, make_generation(PROMPT, max_tokens=4))
    rig.settle()
    assert rig.tokens(1) == continuation(PROMPT, 4)
    assert rig.loads.num_loaded_blocks == 5 * CHUNK_BLOCKS
    rig.check()
    rig.close()


# ----------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in (Fault.SLOW, Fault.FULL, Fault.TORN)])
@pytest.mark.parametrize("chunk", [0, 3])
def test_what_a_store_cannot_give_is_computed(rig: TieredRig, store: LastingStore, fault: Fault, chunk: int) -> None:
    store.tell(rig.key(PROMPT, chunk), fault)
    rig.prefill(1, make_generation(PROMPT))
    rig.settle()
    token, num_cached = answer(rig)
    assert token == next_token(PROMPT)
    assert num_cached == (0 if fault is Fault.ERROR else chunk * CHUNK_TOKENS), "lookups name all keys, loads one"
    rig.check()


@pytest.mark.parametrize("fault", [Fault.TORN, Fault.FULL])
def test_what_was_stored_badly_is_computed_again(fault: Fault) -> None:
    store = LastingStore({fault: 1.0})
    for _ in range(2):
        rig = TieredRig(store)
        rig.prefill(1, make_generation(PROMPT))
        rig.settle()
        assert answer(rig) == (next_token(PROMPT), 0)
        rig.check()
        rig.close()


def test_every_second_part_may_be_anything(store: LastingStore) -> None:
    kinds = (Fault.MISSING, Fault.TRUNCATED, Fault.FLIPPED, Fault.SWAPPED)
    for seed in range(5):
        store._seed = seed
        store.set_faults(dict.fromkeys(kinds, 0.125))
        rig = TieredRig(store)
        rig.prefill(1, make_generation(PROMPT))
        rig.settle()
        assert answer(rig)[0] == next_token(PROMPT)
        rig.check()
        rig.close()


def test_waiting_ends_when_computing_would_have_been_as_fast(rig: TieredRig, store: LastingStore) -> None:
    rig.engine._throughput.record(num_tokens=40, seconds=0.8)
    store.set_faults({Fault.SLOW: 1.0})
    rig.prefill(1, make_generation(PROMPT))
    rig.step_until(lambda: store.num_waiting > 0)
    rig.clock.advance(0.79)
    assert not rig.engine.step() and rig.loads.num_transfers == 1
    rig.clock.advance(0.02)
    assert rig.engine.step(), "it is computed from now on"
    rig.run()
    assert answer(rig) == (next_token(PROMPT), 0)
    store.release()
    rig.settle()
    rig.check()


def test_waiting_ends_while_the_promise_can_be_kept(rig: TieredRig, store: LastingStore) -> None:
    rig.engine._throughput.record(num_tokens=40, seconds=0.8)  # 0.86 s for all of it
    store.set_faults({Fault.SLOW: 1.0})
    rig.prefill(1, make_generation(PROMPT, slo=Slo(ttft_s=1.0)))
    rig.step_until(lambda: store.num_waiting > 0)
    rig.clock.advance(0.13)
    assert not rig.engine.step()
    rig.clock.advance(0.02)
    assert rig.engine.step()
    store.release()
    rig.settle()
    rig.check()


def test_what_is_faster_computed_is_computed(rig: TieredRig, store: LastingStore) -> None:
    assert rig.tiers is not None
    rig.engine._throughput.record(num_tokens=1000, seconds=0.1)
    for tier in rig.chain._stack.tiers:
        tier.speed.record_latency(0.5)
    rig.prefill(1, make_generation(PROMPT))
    rig.settle()
    assert answer(rig) == (next_token(PROMPT), 0)
    assert store.calls["get"] == 0
    rig.check()


@pytest.mark.parametrize(("wait_s", "num_cached"), [(0.0, 0), (5.0, 5 * CHUNK_TOKENS)])
def test_the_wait_can_be_set_and_be_none_at_all(store: LastingStore, wait_s: float, num_cached: int) -> None:
    rig = TieredRig(store, prefix_wait_s=wait_s)
    rig.engine._throughput.record(num_tokens=1000, seconds=1e-6)
    for tier in rig.chain._stack.tiers:
        tier.speed.record_latency(0.5)
    rig.prefill(1, make_generation(PROMPT))
    rig.settle()
    assert answer(rig) == (next_token(PROMPT), num_cached)
    rig.check()
    rig.close()


def test_without_room_it_is_computed(rig: TieredRig) -> None:
    taken = rig.pool.reserve(rig.pool.num_free - 8)
    rig.prefill(1, make_generation(PROMPT))
    rig.step_until(lambda: not rig.loads.num_transfers)
    assert not rig.loads.num_loaded_blocks
    rig.pool.release(taken)
    rig.settle()
    assert answer(rig) == (next_token(PROMPT), 0)
    rig.check()


def test_a_load_takes_no_block_that_somebody_waits_for(rig: TieredRig) -> None:
    other = prompt_of(60, seed=3)
    taken = rig.pool.reserve(rig.pool.num_free - 12)
    rig.prefill(1, make_generation(other))
    rig.compute()
    assert rig.engine.scheduler.waiting, "it needs 15 blocks"
    rig.prefill(2, make_generation(PROMPT))
    rig.compute()
    assert not rig.loads.num_loaded_blocks, "which there were 10 for"
    rig.pool.release(taken)
    rig.settle()
    assert answer(rig, 1)[0] == next_token(other) and answer(rig, 2) == (next_token(PROMPT), 0)
    rig.check()


# ------------------------------------------------------------------------------------------- what is given up


def test_blocks_of_a_copy_under_way_belong_to_nobody_else(rig: TieredRig) -> None:
    """PROTOCOL A5."""
    rig.gates.coming.shut()
    rig.prefill(1, make_generation(PROMPT))
    rig.step_until(lambda: rig.gates.coming.num_waiting > 0)
    rig.engine.handle(Abort(1, "the client went"))
    rig.engine.step()
    assert rig.loads.num_quarantined == 5 * CHUNK_BLOCKS and not rig.engine.is_idle
    assert rig.pool.num_in_use == 5 * CHUNK_BLOCKS
    rig.prefill(2, make_generation(prompt_of(60, seed=9)))  # is not written over by what comes late
    rig.run()
    rig.gates.coming.open()
    rig.settle()
    assert answer(rig, 2)[0] == next_token(prompt_of(60, seed=9))
    assert rig.loads.num_quarantined == 0
    rig.check()


def test_too_many_blocks_in_quarantine_stop_loads(rig: TieredRig, store: LastingStore) -> None:
    rig.gates.coming.shut()
    rig.prefill(1, make_generation(PROMPT))
    rig.step_until(lambda: rig.gates.coming.num_waiting > 0)
    rig.engine.handle(Abort(1, "the client went"))
    rig.prefill(2, make_generation(PROMPT))
    rig.run()
    assert answer(rig, 2) == (next_token(PROMPT), 0)
    rig.gates.coming.open()
    rig.settle()
    rig.check()


def test_a_deadline_ends_a_load(rig: TieredRig) -> None:
    rig.gates.coming.shut()
    rig.prefill(1, make_generation(PROMPT, deadline_s=0.5))
    rig.step_until(lambda: rig.gates.coming.num_waiting > 0)
    rig.clock.advance(0.6)
    rig.engine.step()
    assert rig.error(1) == "DeadlineError"
    rig.gates.coming.open()
    rig.settle()
    rig.check()


def test_an_engine_that_shuts_down_waits_for_no_load(rig: TieredRig) -> None:
    rig.gates.coming.shut()
    rig.prefill(1, make_generation(PROMPT))
    rig.step_until(lambda: rig.gates.coming.num_waiting > 0)
    rig.engine.close()
    assert not rig.engine.has_requests
    rig.gates.coming.open()
