"""A step's completion speaks for a sequence only while its blocks are what they were at the launch (PROTOCOL A2)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from handoff_sides import LAYOUT, MODEL, make_memory, make_sequence

from kvrelay_core.errors import InternalError
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.prefix_cache import PrefixCache
from kvrelay_transfer.pool_memory import PoolMemory

NUM_TOKENS = 2 * LAYOUT.hash_unit_tokens + 1


@pytest.fixture
def memory() -> Iterator[PoolMemory]:
    memory = make_memory(8)
    yield memory
    memory.close()


def test_a_step_that_completed_over_its_own_blocks_seals_them(memory: PoolMemory) -> None:
    pool = BlockPool(8, memory.words)
    cache = PrefixCache(pool, LAYOUT, MODEL)
    sequence = make_sequence(list(range(NUM_TOKENS)))
    sequence.blocks = pool.reserve(LAYOUT.blocks_for(NUM_TOKENS))
    cache.seal(sequence, NUM_TOKENS, cache.words_to_fill(sequence, NUM_TOKENS))
    assert (sequence.num_computed, pool.num_cached) == (NUM_TOKENS, NUM_TOKENS // LAYOUT.block_tokens)
    assert cache.match(make_sequence(list(range(NUM_TOKENS)), 2)) == sequence.blocks[: pool.num_cached]


def test_one_whose_block_was_given_away_meanwhile_seals_nothing(memory: PoolMemory) -> None:
    pool = BlockPool(8, memory.words)
    cache = PrefixCache(pool, LAYOUT, MODEL)
    sequence = make_sequence(list(range(NUM_TOKENS)))
    sequence.blocks = pool.reserve(LAYOUT.blocks_for(NUM_TOKENS))
    words = cache.words_to_fill(sequence, NUM_TOKENS)
    memory.words.bump(sequence.blocks[1])
    with pytest.raises(InternalError, match="reused while its step ran"):
        cache.seal(sequence, NUM_TOKENS, words)
    assert (sequence.num_computed, pool.num_cached) == (0, 0)
