"""Whole clusters whose caches move over UCX: the same tokens as `transformers`, one by one and in a batch."""

from __future__ import annotations

import asyncio

import pytest
from answers import ask_greedy
from cluster import Cluster
from exactness import check_one_by_one
from made_checkpoints import CheckpointMaker
from oracle import NUM_TOKENS, expected_answers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CELLS = [
    pytest.param({}, 16, id="shm-16"),
    pytest.param({"UCX_TLS": "tcp,self"}, 64, id="tcp-64", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("environment", "block_tokens"), CELLS)
async def test_answers_equal_transformers(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], block_tokens: int
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model_dir = checkpoint("qwen3")
    expected = expected_answers(model_dir)
    with Cluster(model_dir, connector="ucx", kv_blocks=640, block_tokens=block_tokens) as cluster:
        async with cluster.client() as client:
            await check_one_by_one(client, expected, "ucx")
            answers = await asyncio.gather(
                *(ask_greedy(client, list(prompt), NUM_TOKENS, "another tenant") for prompt, _ in expected)
            )
            assert [tuple(got) for got in answers] == [answer for _, answer in expected]
        cluster.assert_no_leaks()
