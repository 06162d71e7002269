"""Prefill and decode with KV blocks of different sizes answer as `transformers` does, token for token."""

from __future__ import annotations

from itertools import product

import pytest
from exactness import check_mixed_batch, check_one_by_one
from lone_worker import unequal_pair
from made_checkpoints import CheckpointMaker
from oracle import expected_answers

from kvrelay_client import AsyncClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SIZES = ((16, 64), (64, 16), (32, 128), (128, 32))
SAMPLED = {("grpc", 64, 16)}


def cells() -> list[object]:
    return [
        pytest.param(connector, *sizes, marks=[] if (connector, *sizes) in SAMPLED else [pytest.mark.full])
        for connector, sizes in product(("shm", "grpc"), SIZES)
    ]


@pytest.mark.parametrize(("connector", "theirs", "ours"), cells())
async def test_answers_equal_transformers(checkpoint: CheckpointMaker, connector: str, theirs: int, ours: int) -> None:
    """Chunks of 40 tokens end inside of blocks of every size. The answers outgrow decode's last block."""
    model_dir = checkpoint("llama3_scaled")
    expected = expected_answers(model_dir)
    both = {"connector": connector, "max_num_seqs": 16, "max_batched_tokens": 40}
    prefill = {"block_tokens": theirs, "kv_blocks": 10240 // theirs, **both}
    decode = {"block_tokens": ours, "kv_blocks": 10240 // ours, **both}
    with unequal_pair(model_dir, prefill, decode) as target:
        async with AsyncClient(target) as client:
            await check_one_by_one(client, expected, connector)
            await check_mixed_batch(client, expected, hit_tokens=max(64, theirs))
