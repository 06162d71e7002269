"""What `transformers` answers to the prompts that the token-exact tests ask, once per checkpoint."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from checkpoints import load_reference, reference_greedy

NUM_TOKENS = 64
# From one token to many blocks; aligned to blocks of 16 and 64 tokens, one less and one more.
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 48, 63, 64, 65, 127, 128, 129, 200, 321)
# Logits closer than this may swap with another order of summation.
_MIN_MARGIN = 2e-4
_SPECIAL_TOKENS = 4


def make_prompt(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    generator = random.Random(f"{num_tokens} {seed}")
    return [generator.randrange(vocab_size - _SPECIAL_TOKENS) for _ in range(num_tokens)]


@cache
def expected_answers(model_dir: Path) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """(prompt, answer) for each prompt length."""
    torch.set_num_threads(1)
    vocab_size = load_reference(model_dir).config.vocab_size
    return tuple(_answerable(model_dir, vocab_size, num_tokens) for num_tokens in PROMPT_LENGTHS)


def _answerable(model_dir: Path, vocab_size: int, num_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt whose answer does not hang on rounding."""
    for seed in range(20):
        prompt = make_prompt(vocab_size, num_tokens, seed)
        try:
            [answer] = reference_greedy(model_dir, [prompt], NUM_TOKENS, min_margin=_MIN_MARGIN)
        except AssertionError:
            continue
        return tuple(prompt), tuple(answer)
    raise AssertionError(f"no prompt of {num_tokens} tokens has a stable answer; lower the margin")
