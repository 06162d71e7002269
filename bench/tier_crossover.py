"""Where loading KV beats computing it: the store's seconds for a prompt beside those of a model's prefill.

The model is the one of `relay.py`, run by `ModelRunner` on the CPU. Loading is what a tier does: get, verify, copy to
the place in the pool, on as many threads as the store wants.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from checkpoints import make_checkpoint
from model_rig import ModelRig
from numpy.typing import NDArray
from relay import SHAPE, make_prompts
from tier_moves import value_keys

from kvrelay_engine.loader import load_model
from kvrelay_transfer.tiers.part_format import HEADER_BYTES, PartHeader, open_part
from kvrelay_transfer.tiers.part_key import PartKey

CHUNK_TOKENS = 512
# Layers, KV heads, head size: from their published configurations. In 16 bits.
MODELS = {
    "Qwen2.5-0.5B": (24, 2, 64),
    "Qwen2.5-VL-7B": (28, 4, 128),
    "Qwen3-30B-A3B": (48, 4, 128),
    "Llama-3.1-8B": (32, 8, 128),
    "Llama-3.1-70B": (80, 8, 128),
}


def token_bytes(model: str) -> int:
    layers, kv_heads, head_size = MODELS[model]
    return layers * 2 * kv_heads * head_size * 2


def prefill_seconds(prompt_tokens: Sequence[int]) -> tuple[dict[int, float], int]:
    """Of prompts of so many tokens, each once after a first; and the bytes of KV of a token."""
    with tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as folder:
        path = make_checkpoint(Path(folder) / "model", num_kv_heads=4, **SHAPE)
        rig = ModelRig(load_model(str(path), "float32", "cpu"), num_blocks=max(prompt_tokens) // 16 + 8)
    layout = rig.layouts[0]
    free = list(rig.free_blocks)
    seconds = {}
    for count in (min(prompt_tokens), *prompt_tokens):
        rig.free_blocks[:] = free
        sequence = rig.add(make_prompts(1, count, seed=count)[0], 1)
        started_s = time.perf_counter()
        while not sequence.generated:
            rig.step([sequence], CHUNK_TOKENS)
        seconds[count] = time.perf_counter() - started_s
    return seconds, layout.block_bytes // layout.block_tokens


def use_for(pool: NDArray[np.uint8]) -> Callable[[PartKey, memoryview], None]:
    """What is done with a part that came: verified, and copied to some row of `pool` [rows, body bytes]."""
    rows = itertools.cycle(pool)
    key_of_all = value_keys(1)[0]

    def use(key: PartKey, part: memoryview) -> None:
        assert isinstance(open_part(key_of_all, part), PartHeader)
        np.copyto(next(rows), np.frombuffer(part[HEADER_BYTES:], np.uint8))

    return use


def prefill_speeds(gb_per_s: float) -> dict[str, float]:
    """For each model, the tokens per second up to which computing is slower than loading."""
    return {model: gb_per_s * 1e9 / token_bytes(model) for model in MODELS}
