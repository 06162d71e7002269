"""Makes the first requests as fast as the later ones: steps over the null block before anybody is served.

What a device does once and late is done here: weights come into memory, thread pools and libraries start, and on a
GPU the kernels are compiled for a prompt, also one with an image, for one and for several decoding sequences, and for
the ways to sample.

Leaves no trace: it knows the runner alone, so nothing is counted, cached or measured, and the null block, which
nobody reads, holds afterwards what it held before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kvrelay_core.request import SamplingParams
from kvrelay_engine.block_pool import NULL_BLOCK
from kvrelay_engine.logit_adjustments import PromptTokens
from kvrelay_engine.media_traits import MediaTraits
from kvrelay_engine.runner import BatchRow, MediaRows, Runner
from kvrelay_engine.sampler import Sampler, SamplingRow

PROMPT_TOKENS = 64
NUM_DECODING = 4
_WAYS_TO_SAMPLE = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.1, logprobs=1),
)


def warm_up(
    runner: Runner,
    pools: Sequence[torch.Tensor],
    *,
    block_tokens: int,
    max_tokens: int,
    max_num_seqs: int,
    synchronize: Callable[[], None],
    media: MediaTraits | None = None,
) -> None:
    """`pools` [num_blocks, ...] are the runner's. A prompt is no longer than `max_tokens`, context included.
    With `media` prompts have images here."""
    kept = [pool[NULL_BLOCK].clone() for pool in pools]
    num_tokens = max(1, min(PROMPT_TOKENS, max_tokens - 1))
    table = [NULL_BLOCK] * (num_tokens // block_tokens + 1)
    prompt = BatchRow([0] * num_tokens, 0, table, wants_logits=True, sliding_table=table)
    decoding = BatchRow([0], num_tokens, table, wants_logits=True, sliding_table=table)
    for batch in (
        [prompt],
        [decoding],
        [decoding] * min(NUM_DECODING, max_num_seqs),
        [decoding, prompt],
        *_with_image(prompt, media),
    ):
        logits_RV = runner.run(batch)
        for params in _WAYS_TO_SAMPLE:
            Sampler().sample(logits_RV, [_row(index, params) for index in range(len(batch))])
    for pool, block in zip(pools, kept, strict=True):
        pool[NULL_BLOCK].copy_(block)
    synchronize()


def _with_image(prompt: BatchRow, media: MediaTraits | None) -> list[list[BatchRow]]:
    """The prompt as one image, but for its first token."""
    num_tokens = len(prompt.token_ids)
    if media is None or num_tokens < 2:
        return []
    rows = [MediaRows(1, torch.zeros(num_tokens - 1, media.hidden_size))]
    positions = None if media.mrope is None else (range(num_tokens), [0] * num_tokens, range(num_tokens))
    return [[replace(prompt, media=rows, positions=positions)]]


def _row(index: int, params: SamplingParams) -> SamplingRow:
    return SamplingRow(index, params, seed=0, choice=0, position=1, prompt=PromptTokens((0,)), output=[0])
