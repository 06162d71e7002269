"""What tests of tiers ask a cluster, and how they see where the KV came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answers import Answer, ask
from checkpoints import reference_greedy
from cluster import Cluster
from oracle import make_prompt

from kvrelay.v1 import worker_pb2 as pb

CHUNK = 256  # tokens, of models as small as those of the tests
VOCAB = 200
# It waits for KV even where so small a model would be faster by itself.
FLAGS: dict[str, Any] = {"block_tokens": 16, "kv_blocks": 640, "prefix_wait": 10}


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    expected: list[int]

    @property
    def said(self) -> list[int]:
        """When it has been answered."""
        return self.prompt + self.expected


def question(
    model_dir: Path, num_new: int, seed: int = 1, *, num_tokens: int = 24, after: list[int] | None = None
) -> Asked:
    """So many new tokens, behind what was said before, and what `transformers` answers."""
    prompt = [*(after or []), *make_prompt(VOCAB, num_new, seed)]
    [expected] = reference_greedy(model_dir, [prompt], num_tokens)
    return Asked(prompt, expected)


async def check(cluster: Cluster, asked: Asked, **request: Any) -> Answer:
    async with cluster.client() as client:
        answer = await ask(
            client, token_ids=asked.prompt, max_tokens=len(asked.expected), temperature=0, ignore_eos=True, **request
        )
    assert answer.token_ids == asked.expected
    return answer


def chunks(num_tokens: int) -> int:
    """Tokens of the full chunks in so many tokens."""
    return num_tokens // CHUNK * CHUNK


def tokens_loaded(cluster: Cluster, role: str) -> int:
    """By all workers of the role."""
    blocks = sum(load.tier_blocks_loaded for name, load in cluster.loads().items() if name.startswith(role))
    return blocks * int(FLAGS["block_tokens"])


def tier_of(cluster: Cluster, tier: str, worker: str) -> pb.TierReport:
    """What the worker, such as `prefill-0`, says of one of its tiers."""
    (found,) = [report for report in cluster.loads()[worker].tiers if report.tier == tier]
    return found
