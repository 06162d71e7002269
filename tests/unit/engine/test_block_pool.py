"""Blocks are in one state, words change when and only when a block is given away to be written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay_core.errors import PoolExhaustedError
from kvrelay_engine.block_pool import NULL_BLOCK, BlockPool


class ListWords:
    def __init__(self, num_blocks: int) -> None:
        self.words = [0] * num_blocks

    def read(self, block: int) -> int:
        return self.words[block]

    def bump(self, block: int) -> int:
        self.words[block] += 1
        return self.words[block]


def make_pool(num_blocks: int = 6) -> BlockPool:
    return BlockPool(num_blocks, ListWords(num_blocks))


def test_reserve_is_all_or_nothing() -> None:
    pool = make_pool()
    with pytest.raises(PoolExhaustedError, match="6 KV blocks needed, 5 of 5 free"):
        pool.reserve(6)
    assert pool.num_free == 5
    blocks = pool.reserve(5)
    assert NULL_BLOCK not in blocks and len(set(blocks)) == 5
    pool.check_integrity()


def test_a_word_changes_on_reserve_only() -> None:
    pool = make_pool()
    (block,) = pool.reserve(1)
    word = pool.word(block)
    pool.publish(block, b"k")
    pool.release([block])
    pool.pin(pool.lookup([b"k"]))
    assert pool.word(block) == word
    pool.release([block])
    assert block in pool.reserve(5)
    assert pool.word(block) == word + 1
    assert pool.lookup([b"k"]) == []
    pool.check_integrity()


def test_the_least_recently_freed_block_is_reused_first_and_the_end_of_a_chain_before_its_start() -> None:
    pool = make_pool(7)
    first, second = pool.reserve(3), pool.reserve(3)
    pool.release(second)
    pool.release(first)
    assert pool.reserve(6) == [*reversed(second), *reversed(first)]


def test_a_hit_is_the_longest_prefix() -> None:
    pool = make_pool()
    blocks = pool.reserve(3)
    for block, key in zip(blocks, (b"a", b"b", b"d"), strict=True):
        assert pool.publish(block, key)
    assert pool.lookup([b"a", b"b", b"c", b"d"]) == blocks[:2]
    assert pool.lookup([b"x", b"a"]) == []


def test_duplicates_stay_but_are_not_found() -> None:
    pool = make_pool()
    first, second = pool.reserve(2)
    assert pool.publish(first, b"k")
    assert not pool.publish(second, b"k")
    assert pool.lookup([b"k"]) == [first]
    pool.release([first, second])
    pool.check_integrity()


def test_a_freed_block_waits_for_the_step_that_may_still_write_it() -> None:
    pool = make_pool()
    (block,) = pool.reserve(1)
    pool.publish(block, b"k")
    pool.release([block], last_step=3)
    assert (pool.num_free, pool.lookup([b"k"])) == (4, [])
    pool.check_integrity()
    pool.complete_step(2)
    assert pool.num_free == 4
    pool.complete_step(3)
    assert (pool.num_free, pool.lookup([b"k"])) == (5, [block])
    pool.check_integrity()


def test_a_cleared_cache_hits_nothing_and_loses_no_block() -> None:
    pool = make_pool()
    (block,) = pool.reserve(1)
    pool.publish(block, b"k")
    pool.clear_cache()
    assert (pool.lookup([b"k"]), pool.num_cached) == ([], 0)
    assert pool.publish(block, b"other")
    pool.release([block])
    pool.check_integrity()


def test_integrity_notices_a_lost_block() -> None:
    pool = make_pool()
    (block,) = pool.reserve(1)
    pool._references[block] = 0
    with pytest.raises(AssertionError, match="is in 0 states"):
        pool.check_integrity()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("rpfcks"), st.integers(0, 7)), max_size=60))
def test_any_order_of_calls_keeps_every_block_in_one_state(calls: list[tuple[str, int]]) -> None:
    pool, held, step = make_pool(8), [], 0
    for call, number in calls:
        if call == "r" and number <= pool.num_free:
            held += pool.reserve(number)
        elif call == "p" and held:
            pool.publish(held[number % len(held)], bytes([number]))
        elif call == "f" and held:
            pool.release([held.pop(number % len(held))], last_step=step + number % 3)
        elif call == "c":
            step += 1
            pool.complete_step(step)
        elif call == "k":
            hits = pool.lookup([bytes([number])])
            pool.pin(hits)
            held += hits
        elif call == "s":
            pool.clear_cache()
        pool.check_integrity()
    pool.release(held)
    pool.complete_step(step + 3)
    assert pool.num_in_use == 0
