"""Greedy answers through router, prefill and decode processes equal those of `transformers`, token for token.

A cell of the matrix is one cluster; every cell asks prompts of all lengths one by one (cold), all at once (warm prefix
cache, mixed batch) and once more behind a longer shared prefix.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
from checkpoints import VARIANTS, reference_greedy
from cluster import Cluster
from exactness import check_mixed_batch, check_one_by_one
from made_checkpoints import CheckpointMaker
from oracle import NUM_TOKENS, expected_answers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CONNECTORS = ("shm", "grpc")
# Only the full run has these.
OPTIONAL_CONNECTORS = ("nixl",)
# Whole prompts at once in large blocks, and chunks that end inside of small blocks.
GRAINS: dict[str, dict[str, Any]] = {
    "whole": {"block_tokens": 64, "max_num_seqs": 16, "max_batched_tokens": 2048},
    "chunked": {"block_tokens": 16, "max_num_seqs": 16, "max_batched_tokens": 40},
}


def sampled_cells() -> set[tuple[str, str, str]]:
    """One cell of each variant; over all of them, every connector with every grain."""
    kinds = list(product(CONNECTORS, GRAINS))
    random.Random(1).shuffle(kinds)
    return {(variant, *kinds[index % len(kinds)]) for index, variant in enumerate(VARIANTS)}


def cells() -> list[object]:
    sampled = sampled_cells()
    every = product(VARIANTS, (*CONNECTORS, *OPTIONAL_CONNECTORS), GRAINS)
    return [
        pytest.param(*cell, id="-".join(cell), marks=[] if cell in sampled else [pytest.mark.full]) for cell in every
    ]


def test_the_sample_covers_every_connector_with_every_grain() -> None:
    assert {cell[1:] for cell in sampled_cells()} == set(product(CONNECTORS, GRAINS))
    assert {cell[0] for cell in sampled_cells()} == set(VARIANTS)


@pytest.mark.parametrize(("variant", "connector", "grain"), cells())
async def test_answers_equal_transformers(
    checkpoint: CheckpointMaker, variant: str, connector: str, grain: str
) -> None:
    model_dir = checkpoint(variant)
    expected = expected_answers(model_dir)
    with Cluster(model_dir, connector=connector, kv_blocks=640, **GRAINS[grain]) as cluster:
        async with cluster.client() as client:
            await check_one_by_one(client, expected, connector)
            await check_mixed_batch(client, expected)
        assert cluster.load_of("decode").digests_checked > 0, "nobody looked at every byte"
        cluster.assert_no_leaks()


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_other_block_gives_another_answer(checkpoint: CheckpointMaker, variant: str) -> None:
    """The oracle can fail: KV of a wrong block would be seen, wherever it is."""
    model_dir = checkpoint(variant)
    prompt, answer = expected_answers(model_dir)[-1]
    spoiled = []
    for first in range(0, len(prompt) - 16, 64):
        other = list(prompt)
        other[first : first + 16] = reversed(other[first : first + 16])
        spoiled.append(other)
    for first, got in enumerate(reference_greedy(model_dir, spoiled, NUM_TOKENS)):
        assert tuple(got) != answer, f"block {first} has no influence"
