"""What a cluster has to answer, token for token: prompts of all lengths, cold, in a batch, and from a warm cache."""

from __future__ import annotations

import asyncio

from answers import ask, ask_greedy
from oracle import NUM_TOKENS

from kvrelay_client import AsyncClient

# Enough to fill blocks of 16 and, from most prompts, one of 64; the batch asks for all tokens.
COLD_TOKENS = 40

Expected = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (prompt, answer), the longest prompt last


async def check_one_by_one(client: AsyncClient, expected: Expected, connector: str) -> None:
    for prompt, answer in expected:
        cold = await ask(client, token_ids=prompt, max_tokens=COLD_TOKENS, temperature=0, ignore_eos=True)
        assert tuple(cold.token_ids) == answer[:COLD_TOKENS], f"prompt of {len(prompt)} tokens, cold"
        assert cold.end.usage.prompt_tokens == len(prompt)
        assert (cold.handoff.connector, cold.handoff.size_bytes > 0) == (connector, True)


async def check_mixed_batch(client: AsyncClient, expected: Expected, hit_tokens: int = 64) -> None:
    """All at once, two of them twice: with what the prefix cache knows by now, and as a tenant it knows nothing of.

    `hit_tokens` is the granularity of prefix hits at prefill.
    """
    batch = [*expected, expected[-1], expected[-2]]
    for salt in ("", "another tenant"):
        answers = await asyncio.gather(*(ask_greedy(client, list(prompt), NUM_TOKENS, salt) for prompt, _ in batch))
        for (prompt, answer), got in zip(batch, answers, strict=True):
            assert tuple(got) == answer, f"prompt of {len(prompt)} tokens, in a batch, salt {salt!r}"
    prompt, answer = expected[-1]
    warm = await ask(client, token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    assert tuple(warm.token_ids) == answer
    assert warm.end.usage.cached_tokens == (len(prompt) - 1) // hit_tokens * hit_tokens
