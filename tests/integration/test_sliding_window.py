"""A model with layers that see the last tokens only answers as `transformers` does, token for token, while it keeps no
more of those layers than their window: cold and warm, in one chunk and in many, on blocks of other sizes, after
evictions, and in the next turn of a conversation.
"""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import pytest
from answers import ask, ask_greedy
from checkpoints import reference_greedy
from cluster import Cluster
from exactness import check_mixed_batch, check_one_by_one
from lone_worker import unequal_pair
from made_checkpoints import CheckpointMaker
from oracle import NUM_TOKENS, expected_answers, make_prompt
from sliding_checkpoint import NAME, WINDOW

from kvrelay_client import AsyncClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

# As in test_token_exact: whole prompts in large blocks, and chunks that end inside of small ones.
GRAINS: dict[str, dict[str, Any]] = {
    "whole": {"block_tokens": 64, "max_num_seqs": 16, "max_batched_tokens": 2048},
    "chunked": {"block_tokens": 16, "max_num_seqs": 16, "max_batched_tokens": 40},
}
SAMPLED = {("shm", "chunked"), ("grpc", "whole")}


def cells() -> list[object]:
    every = product(("shm", "grpc", "nixl"), GRAINS)
    return [pytest.param(*cell, marks=[] if cell in SAMPLED else [pytest.mark.full]) for cell in every]


@pytest.mark.parametrize(("connector", "grain"), cells())
async def test_answers_equal_transformers(checkpoint: CheckpointMaker, connector: str, grain: str) -> None:
    model_dir = checkpoint(NAME)
    expected = expected_answers(model_dir)
    with Cluster(model_dir, connector=connector, kv_blocks=640, **GRAINS[grain]) as cluster:
        async with cluster.client() as client:
            await check_one_by_one(client, expected, connector)
            await check_mixed_batch(client, expected)
        cluster.assert_no_leaks()


@pytest.mark.full  # every run has it with engines in the test's own process, and with a model without windows
@pytest.mark.parametrize(("theirs", "ours"), [(16, 64), (64, 16), (32, 128)])
async def test_blocks_of_other_sizes(checkpoint: CheckpointMaker, theirs: int, ours: int) -> None:
    model_dir = checkpoint(NAME)
    expected = expected_answers(model_dir)
    both = {"connector": "shm", "max_num_seqs": 16, "max_batched_tokens": 40}
    prefill = {"block_tokens": theirs, "kv_blocks": 10240 // theirs, **both}
    decode = {"block_tokens": ours, "kv_blocks": 10240 // ours, **both}
    with unequal_pair(model_dir, prefill, decode) as target:
        async with AsyncClient(target) as client:
            await check_one_by_one(client, expected, "shm")
            await check_mixed_batch(client, expected, hit_tokens=max(64, theirs))


async def test_more_prompts_than_the_windows_cache_holds(checkpoint: CheckpointMaker) -> None:
    """Few seats make a small sliding group: it forgets prompts whose other blocks stay cached, and hits are shorter."""
    model_dir = checkpoint(NAME)
    expected = [one for one in expected_answers(model_dir) if len(one[0]) > 4 * WINDOW]
    flags: dict[str, Any] = {"block_tokens": 16, "max_num_seqs": 2, "max_batched_tokens": 24, "kv_blocks": 640}
    with Cluster(model_dir, connector="shm", **flags) as cluster:
        async with cluster.client() as client:
            for _ in range(2):
                for prompt, answer in expected:
                    got = await ask(client, token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
                    assert tuple(got.token_ids) == answer, f"prompt of {len(prompt)} tokens"
            answers = await asyncio.gather(*(ask_greedy(client, list(prompt), NUM_TOKENS) for prompt, _ in expected))
            assert [tuple(got) for got in answers] == [answer for _, answer in expected]
        cluster.assert_no_leaks()


async def test_preempted_answers_are_the_same(checkpoint: CheckpointMaker) -> None:
    """Decode has room for less than half of what it is asked for; it computes again what it had to give up."""
    model_dir = checkpoint(NAME)
    prompts = [make_prompt(200, 90, seed) for seed in range(6)]
    expected = await asyncio.to_thread(reference_greedy, model_dir, prompts, NUM_TOKENS)
    flags: dict[str, Any] = {"block_tokens": 16, "max_num_seqs": 6, "kv_blocks": 34}
    with Cluster(model_dir, prefill=0, decode=1, **flags) as cluster:
        async with cluster.client() as client:
            answers = await asyncio.gather(*(ask_greedy(client, prompt, NUM_TOKENS) for prompt in prompts))
            assert answers == expected
        cluster.assert_no_leaks()


@pytest.mark.parametrize(
    "roles",
    [{"prefill": 2, "decode": 1}, pytest.param({"prefill": 0, "decode": 2}, marks=pytest.mark.full)],
    ids=["to prefill", "to decode"],
)
async def test_the_next_turn_pulls_the_window_too(checkpoint: CheckpointMaker, roles: dict[str, Any]) -> None:
    """Decode -> prefill, and decode -> decode: all blocks of the one group, and the window's of the other.

    Of the prompt decode has no window but the last, so what can be pulled ends in the answer: at token 192 of 210.
    """
    model_dir = checkpoint(NAME)
    flags: dict[str, Any] = {"placement": "round_robin", "block_tokens": 16, "prefix_wait": 10}
    with Cluster(model_dir, connector="shm", **roles, **flags) as cluster:
        async with cluster.client() as client:
            for number in range(sum(cluster.num_workers.values())):  # each worker has answered
                await ask(client, token_ids=[number + 1, 2, 3], max_tokens=2, temperature=0, ignore_eos=True)
            said: list[int] = []
            for turn, num_new in enumerate((150, 30)):
                said += make_prompt(200, num_new, seed=turn)
                [expected] = await asyncio.to_thread(reference_greedy, model_dir, [said], 60)
                got = await ask(client, token_ids=said, max_tokens=60, temperature=0, ignore_eos=True, timeout_s=20.0)
                assert got.token_ids == expected, f"turn {turn}"
                said += expected
            pulled = sum(load.prefix_blocks_pulled for load in cluster.loads().values())
            assert pulled >= 192 // 16, "the second turn's worker had nothing of the first"
        cluster.assert_no_leaks()
