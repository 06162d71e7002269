"""A Gemma 3 text checkpoint whose window is much shorter than the prompts of the token-exact tests."""

from __future__ import annotations

from pathlib import Path

from checkpoint_tokenizer import write_tokenizer
from checkpoints import write_generation_config
from vl_checkpoints import make_gemma

NAME = "gemma3_text"
WINDOW = 24
VOCAB_SIZE = 384


def make_sliding_checkpoint(directory: Path) -> Path:
    """Two KV groups: three local layers and a global one."""
    make_gemma(directory, seed=3, text_only=True, window=WINDOW, layer_types="llgl", vocab_size=VOCAB_SIZE)
    write_generation_config(directory, VOCAB_SIZE)
    write_tokenizer(directory, VOCAB_SIZE, adds_begin_of_text=True)
    return directory
