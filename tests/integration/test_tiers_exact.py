"""KV outlives the workers that computed it: what one left in a tier another one loads, and the answers stay those of
`transformers`, token for token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from answers import Answer, ask
from checkpoints import reference_greedy
from cluster import Cluster
from made_checkpoints import CheckpointMaker
from oracle import make_prompt

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CHUNK = 256  # tokens, of models as small as these
VOCAB = 200
NUM_TOKENS = 24
# It waits for KV even where so small a model would be faster by itself.
FLAGS: dict[str, Any] = {"block_tokens": 16, "kv_blocks": 640, "prefix_wait": 10}


@dataclass
class Asked:
    prompt: list[int]
    expected: list[int]


def question(model_dir: Path, num_tokens: int, seed: int = 1) -> Asked:
    prompt = make_prompt(VOCAB, num_tokens, seed)
    [expected] = reference_greedy(model_dir, [prompt], NUM_TOKENS)
    return Asked(prompt, expected)


async def check(cluster: Cluster, asked: Asked) -> Answer:
    async with cluster.client() as client:
        answer = await ask(client, token_ids=asked.prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    assert answer.token_ids == asked.expected
    return answer


def chunks(num_tokens: int) -> int:
    """Tokens of the full chunks in so many tokens."""
    return num_tokens // CHUNK * CHUNK


async def test_a_cluster_finds_what_the_last_one_left(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    model_dir = checkpoint("llama3_scaled")
    asked = question(model_dir, 4001)
    for is_first in (True, False):
        with Cluster(model_dir, **FLAGS, disk_cache=f"{tmp_path}/kv:1GiB") as cluster:
            answer = await check(cluster, asked)
            assert answer.end.usage.cached_tokens == (0 if is_first else chunks(4000))
            cluster.assert_no_leaks()
