"""The next turn of a conversation finds the KV of the last one, wherever it was left: decode -> prefill with hand-offs,
decode -> decode without. Only what is missing moves, and the answers stay those of `transformers`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from answers import Answer, ask
from checkpoints import reference_greedy
from cluster import Cluster
from made_checkpoints import CheckpointMaker
from oracle import make_prompt

from kvrelay_client import AsyncClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

UNIT = 64
VOCAB = 200
# Placement in turn: the second turn comes to a worker that has seen nothing of the first. It waits for KV even where
# so small a model would be faster by itself.
TWO_PREFILL: dict[str, Any] = {
    "prefill": 2,
    "decode": 1,
    "placement": "round_robin",
    "block_tokens": 16,
    "prefix_wait": 10,
}
TWO_DECODE: dict[str, Any] = {
    "prefill": 0,
    "decode": 2,
    "placement": "round_robin",
    "block_tokens": 16,
    "prefix_wait": 10,
}


@dataclass
class Conversation:
    """Asks turn after turn, each with all that was said before it, and checks every answer."""

    client: AsyncClient
    model_dir: Path
    said: list[int] = field(default_factory=list)
    turns: int = 0

    async def ask(self, num_new: int, num_tokens: int = 40) -> Answer:
        self.turns += 1
        self.said += make_prompt(VOCAB, num_new, seed=self.turns)
        [expected] = await asyncio.to_thread(reference_greedy, self.model_dir, [self.said], num_tokens)
        answer = await ask(
            self.client, token_ids=self.said, max_tokens=num_tokens, temperature=0, ignore_eos=True, timeout_s=20.0
        )
        assert answer.token_ids == expected, f"turn {self.turns}"
        self.said += answer.token_ids
        return answer


async def meet_everybody(client: AsyncClient, cluster: Cluster) -> None:
    """Until each worker has answered: a cluster is ready with the first of each role. Shorter than a hash unit."""
    met: set[str] = set()
    while len(met - {""}) < sum(cluster.num_workers.values()):
        answer = await ask(client, token_ids=[len(met) + 1, 2, 3], max_tokens=2, temperature=0, ignore_eos=True)
        met |= {answer.end.timing.prefill_worker, answer.end.timing.decode_worker}


def units(num_tokens: int) -> int:
    """Tokens of the full hash units in so many tokens."""
    return num_tokens // UNIT * UNIT


def pulled(cluster: Cluster) -> dict[str, int]:
    return {worker: load.prefix_blocks_pulled for worker, load in cluster.loads().items()}


@pytest.mark.parametrize("connector", ["shm", pytest.param("grpc", marks=pytest.mark.full)])
async def test_prefill_takes_the_last_turn_back_from_decode(checkpoint: CheckpointMaker, connector: str) -> None:
    model_dir = checkpoint("llama3_scaled")
    with Cluster(model_dir, connector=connector, **TWO_PREFILL) as cluster:
        async with cluster.client() as client:
            await meet_everybody(client, cluster)
            conversation = Conversation(client, model_dir)
            first = await conversation.ask(100)
            assert first.end.usage.cached_tokens == 0 and not any(pulled(cluster).values())
            known = len(conversation.said) - 1  # decode has no KV of the last token
            second = await conversation.ask(50)
            assert first.end.timing.prefill_worker != second.end.timing.prefill_worker
            assert second.end.usage.cached_tokens == units(known)
            assert sum(pulled(cluster).values()) == units(known) // 16
            # Back at the first one, which has kept its own: only what was said since moves.
            known = len(conversation.said) - 1
            third = await conversation.ask(30)
            assert third.end.timing.prefill_worker == first.end.timing.prefill_worker
            assert third.end.usage.cached_tokens == units(known)
            own = units(100)
            assert pulled(cluster)[third.end.timing.prefill_worker] == (units(known) - own) // 16
        cluster.assert_no_leaks()


async def test_a_decode_worker_goes_on_from_another_ones_kv(checkpoint: CheckpointMaker) -> None:
    model_dir = checkpoint("qwen3")
    with Cluster(model_dir, connector="shm", **TWO_DECODE) as cluster:
        async with cluster.client() as client:
            await meet_everybody(client, cluster)
            conversation = Conversation(client, model_dir)
            first = await conversation.ask(150)
            known = len(conversation.said) - 1
            second = await conversation.ask(20)
            assert first.end.timing.decode_worker != second.end.timing.decode_worker
            assert pulled(cluster) == {
                first.end.timing.decode_worker: 0, second.end.timing.decode_worker: units(known) // 16
            }  # fmt: skip
        cluster.assert_no_leaks()


@pytest.mark.full
async def test_another_tenant_gets_nothing_of_it(checkpoint: CheckpointMaker) -> None:
    model_dir = checkpoint("llama3_scaled")
    prompt = make_prompt(VOCAB, 150, seed=1)
    request: dict[str, Any] = {"token_ids": prompt, "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    with Cluster(model_dir, connector="shm", **TWO_PREFILL) as cluster:
        async with cluster.client() as client:
            mine = await ask(client, **request, cache_salt="me")
            theirs = await ask(client, **request, cache_salt="them")
            assert mine.token_ids == theirs.token_ids
            assert theirs.end.usage.cached_tokens == 0 and not any(pulled(cluster).values())
        cluster.assert_no_leaks()


@pytest.mark.full
async def test_a_holder_that_is_gone_or_hangs_costs_a_wait_and_no_more(checkpoint: CheckpointMaker) -> None:
    model_dir = checkpoint("llama3_scaled")
    flags = {**TWO_PREFILL, "decode": 2, "prefix_wait": 1}
    with Cluster(model_dir, connector="shm", **flags) as cluster:
        async with cluster.client() as client:
            await meet_everybody(client, cluster)
            conversation = Conversation(client, model_dir)
            first = await conversation.ask(150)
            holder = int(first.end.timing.decode_worker.rpartition("-")[2])
            stopped = [cluster.pid_of("decode", holder), cluster.engine_pid_of("decode", holder)]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            second = await conversation.ask(20)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            assert second.end.timing.decode_worker != first.end.timing.decode_worker
            holder = int(second.end.timing.decode_worker.rpartition("-")[2])
            old_pid = cluster.kill("decode", holder)
            await conversation.ask(20)
            cluster.wait_restarted("decode", holder, old_pid)
            await conversation.ask(20)
        cluster.assert_no_leaks()
