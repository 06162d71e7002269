"""Answers about pictures through router, encoder, prefill and decode processes equal those of `transformers`.

A cell of the matrix is one cluster. It is asked prompts with pictures in every place: one by one (cold), with another
picture in the same place, in every way that makes the same prompt (out of every cache), all at once, and prompts that
share a beginning which ends inside a picture.
"""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import pytest
from answers import ask_choices
from cluster import Cluster
from vision_cases import MODELS, VisionCase, VisionCases, ask_about
from vision_questions import NUM_TOKENS, usable_prefix

from kvrelay_client import AsyncClient

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CONNECTORS = ("shm", "grpc")
# Whole prompts in large blocks; chunks that end inside of small ones; and steps of less than Gemma's image of 16.
GRAINS: dict[str, dict[str, Any]] = {
    "whole": {"block_tokens": 64, "max_num_seqs": 16, "max_batched_tokens": 2048},
    "chunked": {"block_tokens": 16, "max_num_seqs": 16, "max_batched_tokens": 24},
    "crumbs": {"block_tokens": 16, "max_num_seqs": 8, "max_batched_tokens": 10},
}
# Every model, every grain and every connector; the full run has the rest.
SAMPLED = {("qwen2_5_vl", "shm", "whole"), ("gemma3", "grpc", "crumbs"), ("gemma3_crops", "shm", "chunked")}
HIT_TOKENS = 64


def cells() -> list[object]:
    return [
        pytest.param(*cell, id="-".join(cell), marks=[] if cell in SAMPLED else [pytest.mark.full])
        for cell in product(MODELS, CONNECTORS, GRAINS)
    ]


@pytest.mark.parametrize(("model", "connector", "grain"), cells())
async def test_encoder_exact_matrix(vision_cases: VisionCases, model: str, connector: str, grain: str) -> None:
    case = vision_cases(model)
    with Cluster(case.model_dir, encoder=1, connector=connector, kv_blocks=640, **GRAINS[grain]) as cluster:
        async with cluster.client() as client:
            await check_cold(client, case)
            await check_warm(client, case)
            await check_all_at_once(client, case)
            await check_shared_beginnings(client, case)
        cluster.assert_no_leaks()


async def check_cold(client: AsyncClient, case: VisionCase) -> None:
    """Then another picture in the same place, which gives another answer."""
    for question in case.questions:
        cold = await ask_about(client, **question.ways()[0])
        assert cold.token_ids == question.answer, f"{question.name}, cold"
        assert cold.end.usage.prompt_tokens == len(question.ids)
        other = await ask_about(client, **question.other())
        assert other.token_ids == question.other_answer, f"{question.name}, another picture"


async def check_warm(client: AsyncClient, case: VisionCase) -> None:
    """However it is asked, it is the prompt that the prefix cache knows, as far as images may be cut."""
    for question in case.questions:
        known = usable_prefix(case.reference, question.ids, len(question.ids), HIT_TOKENS)
        for way in question.ways():
            warm = await ask_about(client, **way)
            assert warm.token_ids == question.answer, f"{question.name} by {', '.join(way)}, warm"
            assert warm.end.usage.prompt_tokens == len(question.ids)
            assert warm.end.usage.cached_tokens == known, f"{question.name} by {', '.join(way)}"


async def check_all_at_once(client: AsyncClient, case: VisionCase) -> None:
    """With what the caches know, and as a tenant whose prefixes are not known; and two choices of one prompt."""
    for salt in ("", "another tenant"):
        both = [way for question in case.questions for way in (question.ways()[0], question.other())]
        expected = [tokens for question in case.questions for tokens in (question.answer, question.other_answer)]
        got = await asyncio.gather(*(ask_about(client, cache_salt=salt, **way) for way in both))
        assert [one.token_ids for one in got] == expected, f"all at once, salt {salt!r}"
    for question in case.questions:
        greedy = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        choices = await ask_choices(client, n=2, **greedy, **question.ways()[0])
        assert [choice.token_ids for choice in choices] == [question.answer] * 2, f"{question.name}, two choices"


async def check_shared_beginnings(client: AsyncClient, case: VisionCase) -> None:
    """A cached unit ends inside an image, other text follows it; then the next turn, with another picture."""
    first = case.maker.bare("straddling", (56, "B", 70))
    [size] = case.reference.num_placeholders(first.pictures[0])
    num_shared = 56 + size
    fork = case.maker.spliced("other text", first, num_shared, (75,))
    turn = case.maker.bare("next turn", (50, "B", 9), after=first)
    for question, shared in ((first, 0), (fork, num_shared), (first, len(first.ids)), (turn, len(first.ids))):
        got = await ask_about(client, **question.ways()[0])
        assert got.token_ids == question.answer, question.name
        known = usable_prefix(case.reference, question.ids, shared, HIT_TOKENS)
        assert got.end.usage.cached_tokens == known, question.name
