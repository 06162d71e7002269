"""Tokens come as they are made, in order, with text that adds up and timings that make sense."""

from __future__ import annotations

import time

import pytest
from answers import ask
from cluster import Cluster
from oracle import make_prompt
from processes import command_line
from tokenizers import Tokenizer

from kvrelay_client import Delta, Finish

pytestmark = [pytest.mark.cluster]

VOCAB_SIZE = 384


async def test_tokens_come_one_after_another(cluster: Cluster) -> None:
    arrivals = []
    async with cluster.client() as client:
        async for event in client.generate(
            token_ids=make_prompt(VOCAB_SIZE, 100, 1), temperature=0, max_tokens=60, ignore_eos=True
        ):
            arrivals.append((time.monotonic(), event))
    *deltas, (_, finish) = arrivals
    assert isinstance(finish, Finish)
    assert all(isinstance(event, Delta) for _, event in deltas)
    # Merged only when the writer is behind: a stream, not one lump at the end.
    assert len(deltas) > 20
    assert finish.timing.ttft_s < finish.timing.total_s
    assert 0 < finish.timing.inter_token_mean_s <= finish.timing.inter_token_max_s


async def test_text_adds_up_and_is_never_half_a_character(cluster: Cluster) -> None:
    prompt = "Überall dasselbe: 你好, здравствуй 🙂"
    async with cluster.client() as client:
        info = await client.model_info()
        answer = await ask(client, prompt=prompt, temperature=1.0, seed=3, max_tokens=80, ignore_eos=True)
    assert info.vocab_size == VOCAB_SIZE
    words = command_line(cluster.pid_of("router"))
    model_dir = words[words.index("--model") + 1]
    tokenizer = Tokenizer.from_file(f"{model_dir}/tokenizer.json")
    assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)


async def test_a_chat_is_rendered_by_the_checkpoints_template(cluster: Cluster) -> None:
    async with cluster.client() as client:
        chat = await ask(client, messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=8)
        text = await ask(client, prompt="hi", temperature=0, max_tokens=8)
    assert chat.end.usage.prompt_tokens > text.end.usage.prompt_tokens


async def test_a_shared_prefix_is_not_computed_again(cluster: Cluster) -> None:
    shared = make_prompt(VOCAB_SIZE, 256, 9)
    async with cluster.client() as client:
        first = await ask(client, token_ids=[*shared, 1, 2, 3], temperature=0, max_tokens=4)
        second = await ask(client, token_ids=[*shared, 4, 5, 6], temperature=0, max_tokens=4)
        salted = await ask(client, token_ids=[*shared, 4, 5, 6], temperature=0, max_tokens=4, cache_salt="other")
    assert first.end.usage.cached_tokens == 0
    assert second.end.usage.cached_tokens == 256
    assert second.handoff.blocks_reused > 0
    assert salted.end.usage.cached_tokens == 0
