"""Seeded sampling does not depend on company or place; choices differ; stop conditions and log probabilities hold."""

from __future__ import annotations

import asyncio
import math

import pytest
from answers import ask, ask_choices, ask_greedy
from cluster import Cluster
from made_checkpoints import CheckpointMaker
from oracle import make_prompt

from kvrelay_client import AsyncClient, Delta
from kvrelay_core.request import TokenLogprobs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

VOCAB_SIZE = 384
SEEDED = [
    {"token_ids": make_prompt(VOCAB_SIZE, num_tokens, 7), "seed": num_tokens, "max_tokens": 24, **sampling}
    for num_tokens, sampling in (
        (5, {"temperature": 1.0}),
        (40, {"temperature": 0.7, "top_k": 20}),
        (64, {"temperature": 1.3, "top_p": 0.8}),
        (90, {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2}),
        (130, {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": 0.5}),
        (17, {"temperature": 0.9, "n": 3}),
    )
]


async def sample_all(client: AsyncClient, *, together: bool) -> list[list[list[int]]]:
    """Of each request, the tokens of each choice."""
    if together:
        answers = await asyncio.gather(*(ask_choices(client, **request) for request in SEEDED))
    else:
        answers = [await ask_choices(client, **request) for request in SEEDED]
    return [[choice.token_ids for choice in choices] for choices in answers]


async def test_the_same_tokens_alone_in_a_batch_and_with_more_decode_workers(
    cluster: Cluster, checkpoint: CheckpointMaker
) -> None:
    model_dir = checkpoint("llama3_scaled")
    async with cluster.client() as client:
        alone = await sample_all(client, together=False)
        assert await sample_all(client, together=True) == alone
    with Cluster(model_dir, decode=3, placement="round_robin", block_tokens=64, max_num_seqs=32) as wider:
        async with wider.client() as client:
            assert await sample_all(client, together=True) == alone
            assert await sample_all(client, together=False) == alone
        wider.assert_no_leaks()


async def test_choices_and_seeds_differ(cluster: Cluster) -> None:
    prompt = make_prompt(VOCAB_SIZE, 70, 3)
    async with cluster.client() as client:
        choices = await ask_choices(client, token_ids=prompt, n=4, seed=5, temperature=1.0, max_tokens=16)
        other = await ask_choices(client, token_ids=prompt, n=4, seed=6, temperature=1.0, max_tokens=16)
    answers = {tuple(choice.token_ids) for choice in (*choices, *other)}
    assert len(answers) == 8


async def test_a_request_without_a_seed_gets_another_one_each_time(cluster: Cluster) -> None:
    prompt = make_prompt(VOCAB_SIZE, 20, 3)
    async with cluster.client() as client:
        answers = [await ask(client, token_ids=prompt, temperature=1.0, max_tokens=16) for _ in range(3)]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3


async def test_max_tokens_one_needs_no_decode(cluster: Cluster) -> None:
    prompt = make_prompt(VOCAB_SIZE, 20, 4)
    steps = cluster.loads()["decode-0"].steps
    async with cluster.client() as client:
        answer = await ask(client, token_ids=prompt, temperature=0, max_tokens=1, ignore_eos=True)
        assert cluster.loads()["decode-0"].steps == steps
        longer = await ask_greedy(client, prompt, 3)
    assert answer.token_ids == longer[:1]
    assert answer.end.reason == "length"
    assert answer.end.timing.handoff is None


async def test_stop_tokens_and_min_tokens(cluster: Cluster) -> None:
    prompt = make_prompt(VOCAB_SIZE, 33, 4)
    greedy = {"token_ids": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 20}
    async with cluster.client() as client:
        free = (await ask(client, **greedy)).token_ids
        stop = free[7]
        first = free.index(stop)
        stopped = await ask(client, **greedy, stop_token_ids=[stop])
        kept_on = await ask(client, **greedy, stop_token_ids=[stop], min_tokens=12)
    assert stopped.token_ids[:first] == free[:first]
    assert (stopped.end.reason, stopped.end.stop_reason) == ("stop", str(stop))
    assert len(kept_on.token_ids) >= 12
    assert stop not in kept_on.token_ids[:11]


async def test_a_stop_string_ends_the_text_before_it(cluster: Cluster) -> None:
    greedy = {"prompt": "tell me", "temperature": 0, "ignore_eos": True, "max_tokens": 40}
    async with cluster.client() as client:
        free = (await ask(client, **greedy)).text
        middle = len(free) // 2
        stop = free[middle : middle + 3]
        stopped = await ask(client, **greedy, stop=[stop])
    assert stopped.text == free[: free.index(stop)]
    assert (stopped.end.reason, stopped.end.stop_reason) == ("stop", stop)


async def test_log_probabilities(cluster: Cluster) -> None:
    prompt = make_prompt(VOCAB_SIZE, 20, 5)
    found: list[tuple[int, TokenLogprobs]] = []
    async with cluster.client() as client:
        async for event in client.generate(token_ids=prompt, temperature=0, max_tokens=5, ignore_eos=True, logprobs=3):
            if isinstance(event, Delta):
                found += zip(event.token_ids, event.logprobs, strict=True)
    assert len(found) == 5
    for token_id, entry in found:
        assert len(entry.top) == 3
        assert entry.top[0][0] == token_id  # greedy takes the most likely
        assert math.isclose(entry.top[0][1], entry.logprob, abs_tol=1e-5)
        assert sum(math.exp(logprob) for _, logprob in entry.top) <= 1 + 1e-5


async def test_logit_bias_forbids_and_forces(cluster: Cluster) -> None:
    prompt = make_prompt(VOCAB_SIZE, 20, 6)
    async with cluster.client() as client:
        free = await ask_greedy(client, prompt, 4)
        other = await ask(client, token_ids=prompt, temperature=0, max_tokens=4, logit_bias={free[0]: -100.0})
        forced = await ask(
            client, token_ids=prompt, temperature=0, max_tokens=4, ignore_eos=True, logit_bias={11: 100.0}
        )
    assert free[0] not in other.token_ids
    assert forced.token_ids == [11] * 4
