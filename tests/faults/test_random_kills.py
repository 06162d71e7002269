"""Eight conversations at a time while workers, engines and the router are killed, stopped and hung at random."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from kill_storm import KillStorm, Turn, make_talks
from made_checkpoints import CheckpointMaker

pytestmark = [pytest.mark.cluster, pytest.mark.full, pytest.mark.timeout(400)]

SECONDS = 60.0
SETTLE_S = 10.0
FLAGS: dict[str, Any] = {
    "placement": "round_robin",
    "block_tokens": 16,
    "max_num_seqs": 16,
    "kv_blocks": 400,
    "prefix_wait": 2,
}


@pytest.fixture(scope="module")
def model_dir(checkpoint: CheckpointMaker) -> Path:
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def talks(model_dir: Path) -> list[list[Turn]]:
    return make_talks(model_dir)


@pytest.mark.parametrize(
    ("connector", "prefill", "decode", "seed"),
    [("shm", 2, 2, 1), ("grpc", 2, 2, 2), ("nixl", 2, 2, 3), ("ucx", 2, 2, 4), ("shm", 0, 3, 5)],
)
async def test_tokens_stay_right_and_nothing_is_left(
    model_dir: Path, talks: list[list[Turn]], connector: str, prefill: int, decode: int, seed: int
) -> None:
    """The next turn is pulled from decode to prefill; without prefill workers from one decode worker to another."""
    with Cluster(model_dir, prefill=prefill, decode=decode, connector=connector, **FLAGS) as cluster:
        storm = KillStorm(cluster, talks, seed)
        await storm.run(SECONDS)
        await storm.settle()
        print(storm.num_right, storm.blocks_pulled_from_others, storm.errors, storm.harms)  # shown by -rP
        await asyncio.to_thread(cluster.assert_no_leaks, SETTLE_S)
        assert not storm.unexplained()
        assert not storm.num_wrong
        assert storm.num_right >= SECONDS / 4
        assert len(storm.harms) >= 4 and storm.harms.total() >= SECONDS / 5
        assert storm.blocks_pulled_from_others > 0
