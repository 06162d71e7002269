"""What `transformers` answers to the prompts that the token-exact tests ask, once per checkpoint."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from checkpoints import load_reference, reference_answers

NUM_TOKENS = 64
# From one token to many blocks; aligned to blocks of 16 and 64 tokens, one less and one more.
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 48, 63, 64, 65, 127, 128, 129, 200, 321)
# Logits closer than this may swap with another order of summation.
_MIN_MARGIN = 2e-4
_SPECIAL_TOKENS = 4
_MAX_SEEDS = 20


def make_prompt(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    generator = random.Random(f"{num_tokens} {seed}")
    return [generator.randrange(vocab_size - _SPECIAL_TOKENS) for _ in range(num_tokens)]


@cache
def expected_answers(model_dir: Path) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """(prompt, answer) for each prompt length."""
    torch.set_num_threads(1)
    vocab_size = load_reference(model_dir).config.vocab_size
    found = decisive_prompts(model_dir, PROMPT_LENGTHS, NUM_TOKENS, _MIN_MARGIN, vocab_size)
    return tuple((tuple(prompt), tuple(answer)) for prompt, answer in found)


def decisive_prompts(
    model_dir: Path, lengths: Sequence[int], num_tokens: int, min_margin: float, vocab_size: int
) -> list[tuple[list[int], list[int]]]:
    """Of each length a prompt, with its answer, that does not hang on rounding."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for seed in range(_MAX_SEEDS):
        prompts = [make_prompt(vocab_size, length, seed) for length in lengths if length not in found]
        if not prompts:
            break
        for prompt, answer in zip(prompts, reference_answers(model_dir, prompts, num_tokens), strict=True):
            if answer.margin >= min_margin:
                found[len(prompt)] = prompt, answer.tokens
    missing = set(lengths) - found.keys()
    assert not missing, f"no prompt of {missing} tokens has a stable answer; lower the margin"
    return [found[length] for length in lengths]
