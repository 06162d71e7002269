"""What a cluster is asked in a cell of the matrices of answers about pictures and videos, and how it has to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from answers import ask_choices
from vision_cases import VisionCase, ask_about
from vision_questions import NUM_TOKENS, Question, usable_prefix

from kvrelay_client import AsyncClient

HIT_TOKENS = 64
# Nothing is forgotten: what is cached is known to the token, in layers with a window as well.
POOLS: dict[str, Any] = {"kv_blocks": 640, "sliding_blocks": 640}
CONNECTORS = ("shm", "grpc")
# Whole prompts in large blocks; chunks that end inside of small ones; and steps of less than Gemma's image of 16.
GRAINS: dict[str, dict[str, Any]] = {
    "whole": {"block_tokens": 64, "max_num_seqs": 16, "max_batched_tokens": 2048},
    "chunked": {"block_tokens": 16, "max_num_seqs": 16, "max_batched_tokens": 24},
    "crumbs": {"block_tokens": 16, "max_num_seqs": 8, "max_batched_tokens": 10},
}


async def check_cold(client: AsyncClient, questions: Sequence[Question]) -> None:
    """Then another picture in the same place, which gives another answer."""
    for question in questions:
        cold = await ask_about(client, **question.ways()[0])
        assert cold.token_ids == question.answer, f"{question.name}, cold"
        assert cold.end.usage.prompt_tokens == len(question.ids)
        other = await ask_about(client, **question.other())
        assert other.token_ids == question.other_answer, f"{question.name}, another picture"


async def check_warm(client: AsyncClient, case: VisionCase, questions: Sequence[Question]) -> None:
    """However it is asked, it is the prompt that the prefix cache knows, as far as images may be cut."""
    for question in questions:
        known = usable_prefix(case.reference, question.ids, len(question.ids), HIT_TOKENS)
        for way in question.ways():
            warm = await ask_about(client, **way)
            assert warm.token_ids == question.answer, f"{question.name} by {', '.join(way)}, warm"
            assert warm.end.usage.prompt_tokens == len(question.ids)
            assert warm.end.usage.cached_tokens == known, f"{question.name} by {', '.join(way)}"


async def check_all_at_once(client: AsyncClient, questions: Sequence[Question]) -> None:
    """With what the caches know, and as a tenant whose prefixes are not known; and two choices of one prompt."""
    for salt in ("", "another tenant"):
        both = [way for question in questions for way in (question.ways()[0], question.other())]
        expected = [tokens for question in questions for tokens in (question.answer, question.other_answer)]
        got = await asyncio.gather(*(ask_about(client, cache_salt=salt, **way) for way in both))
        assert [one.token_ids for one in got] == expected, f"all at once, salt {salt!r}"
    for question in questions:
        greedy = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        choices = await ask_choices(client, n=2, **greedy, **question.ways()[0])
        assert [choice.token_ids for choice in choices] == [question.answer] * 2, f"{question.name}, two choices"


async def check_shared_beginnings(client: AsyncClient, case: VisionCase, item: str) -> None:
    """A cached unit ends inside an item, other text follows it; then the next turn, with a picture."""
    first = case.maker.bare(f"straddling {item}", (56, item, 70))
    [size] = case.reference.num_placeholders(first.media[0])
    num_shared = 56 + size
    fork = case.maker.spliced("other text", first, num_shared, (75,))
    turn = case.maker.bare("next turn", (50, "B", 9), after=first)
    for question, shared in ((first, 0), (fork, num_shared), (first, len(first.ids)), (turn, len(first.ids))):
        got = await ask_about(client, **question.ways()[0])
        assert got.token_ids == question.answer, question.name
        known = usable_prefix(case.reference, question.ids, shared, HIT_TOKENS)
        assert got.end.usage.cached_tokens == known, question.name
