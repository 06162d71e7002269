"""Prefill on one GPU, decode on another, KV over NVLink: the answers of `transformers`, and one process's logits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import ask, ask_greedy
from cluster import Cluster
from made_checkpoints import CheckpointMaker
from model_rig import ModelRig
from oracle import NUM_TOKENS, expected_answers

from kvrelay_client import AsyncClient, Delta
from kvrelay_engine.loader import load_model
from kvrelay_engine.runner import BatchRow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

FLAGS: dict[str, Any] = {
    "connector": "cuda_ipc",
    "device": "cuda",
    "prefill_devices": 0,
    "decode_devices": 1,
    "kv_blocks": 640,
}
# Of the norm over an answer's tokens: bfloat16 results of two batch shapes differ in their last bits.
LOGPROB_TOLERANCE = 0.05
NUM_BFLOAT16_TOKENS = 12


@pytest.mark.parametrize(("block_tokens", "max_batched_tokens"), [(64, 2048), (16, 40)], ids=["whole", "chunked"])
async def test_float32_answers_equal_transformers(
    checkpoint: CheckpointMaker, block_tokens: int, max_batched_tokens: int
) -> None:
    model_dir = checkpoint("llama3_scaled")
    expected = expected_answers(model_dir)
    grain: dict[str, Any] = {"block_tokens": block_tokens, "max_num_seqs": 16, "max_batched_tokens": max_batched_tokens}
    with Cluster(model_dir, dtype="float32", **FLAGS, **grain) as cluster:
        async with cluster.client() as client:
            for prompt, answer in expected:
                cold = await ask(client, token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
                assert tuple(cold.token_ids) == answer, f"prompt of {len(prompt)} tokens"
                assert (cold.handoff.connector, cold.handoff.size_bytes > 0) == ("cuda_ipc", True)
            batch = await asyncio.gather(
                *(ask_greedy(client, list(prompt), NUM_TOKENS, "another tenant") for prompt, _ in expected)
            )
            assert [tuple(got) for got in batch] == [answer for _, answer in expected]
        cluster.assert_no_leaks()


async def test_bfloat16_logits_are_those_of_one_process(checkpoint: CheckpointMaker) -> None:
    model_dir = checkpoint("llama3_scaled")
    prompts = [list(prompt) for prompt, _ in expected_answers(model_dir)]
    with Cluster(model_dir, dtype="bfloat16", block_tokens=16, **FLAGS) as cluster:
        async with cluster.client() as client:
            answers = [await with_logprobs(client, prompt) for prompt in prompts]
        cluster.assert_no_leaks()
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        expected = one_process_logprobs(model_dir, prompt, tokens)
        assert distance(logprobs, expected) < LOGPROB_TOLERANCE, f"prompt of {len(prompt)} tokens"
    # The measure can fail: one block of 16 tokens that is another's would be seen.
    spoiled = [*prompts[-1][:64], *reversed(prompts[-1][64:80]), *prompts[-1][80:]]
    tokens, logprobs = answers[-1]
    assert distance(logprobs, one_process_logprobs(model_dir, spoiled, tokens)) > LOGPROB_TOLERANCE


def distance(logprobs: list[float], expected: torch.Tensor) -> float:
    return float((torch.tensor(logprobs) - expected).norm() / expected.norm())


async def with_logprobs(client: AsyncClient, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens, and the log probability of each."""
    tokens: list[int] = []
    logprobs: list[float] = []
    async for event in client.generate(
        token_ids=prompt, max_tokens=NUM_BFLOAT16_TOKENS, temperature=0, ignore_eos=True, logprobs=1
    ):
        if isinstance(event, Delta):
            tokens += event.token_ids
            logprobs += [entry.logprob for entry in event.logprobs]
    return tokens, logprobs


def one_process_logprobs(model_dir: Path, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Of the same tokens, each computed in this process from the whole text before it, in one step."""
    rig = ModelRig(load_model(str(model_dir), "bfloat16", "cuda:0"))
    found = []
    for index, token in enumerate(tokens):
        sequence = rig.add([*prompt, *tokens[:index]], 0)
        logits = rig.runner.run([BatchRow(sequence.tokens, 0, sequence.block_table, True)])
        found.append(torch.log_softmax(logits[0].float(), -1)[token].cpu())
        rig.free_blocks += sequence.block_table
    return torch.stack(found)
