"""Specs of paged attention. What no token of a context wrote, or no query of it sees, is NaN: whoever uses it is found
out.
"""

from __future__ import annotations

import itertools

import torch

from kvrelay_kernels.attention import reference
from kvrelay_kernels.attention.batch import AttentionBatch
from kvrelay_kernels.spec import FLOAT_TOLERANCES, Inputs, OpSpec, Shape, Tolerance

# "sequences" are pairs of query length and context length.
_SHAPES = {
    "decode, aligned": {"sequences": [(1, 64), (1, 128)], "heads": 4, "kv_heads": 2, "dim": 64, "block_tokens": 64},
    "decode, odd": {"sequences": [(1, 1), (1, 77), (1, 130)], "heads": 6, "kv_heads": 2, "dim": 80, "block_tokens": 16},
    "decode, first token": {"sequences": [(1, 1)], "heads": 2, "kv_heads": 2, "dim": 16, "block_tokens": 4},
    "decode, in splits": {"sequences": [(1, 300), (1, 5)], "heads": 8, "kv_heads": 1, "dim": 32, "block_tokens": 32},
    "prompt, aligned": {"sequences": [(64, 64)], "heads": 2, "kv_heads": 2, "dim": 32, "block_tokens": 16},
    "prompt, odd": {"sequences": [(37, 37), (2, 2)], "heads": 3, "kv_heads": 1, "dim": 16, "block_tokens": 8},
    "chunk that splits a block": {"sequences": [(21, 50)], "heads": 4, "kv_heads": 2, "dim": 32, "block_tokens": 16},
    "mixed": {"sequences": [(1, 9), (5, 40), (1, 33), (7, 7)], "heads": 4, "kv_heads": 4, "dim": 16, "block_tokens": 4},
    "blocks of one token": {"sequences": [(1, 6), (3, 5)], "heads": 2, "kv_heads": 1, "dim": 16, "block_tokens": 1},
    "small heads": {"sequences": [(1, 20), (9, 30)], "heads": 4, "kv_heads": 2, "dim": 8, "block_tokens": 16},
    "single block": {"sequences": [(1, 20), (4, 100)], "heads": 2, "kv_heads": 1, "dim": 128, "block_tokens": 128},
}
# "ahead" are, for each sequence, stretches of its context in which every token sees all: (first, last).
_MASKED_SHAPES = {
    "decode, odd": {**_SHAPES["decode, odd"], "window": 50},
    "decode, window of one": {**_SHAPES["decode, odd"], "window": 1},
    "decode, in splits": {**_SHAPES["decode, in splits"], "window": 190},
    "decode, wide window": {**_SHAPES["decode, odd"], "window": 1000},
    "decode, small blocks": {**_SHAPES["mixed"], "window": 6},
    "prompt": {**_SHAPES["prompt, odd"], "window": 9},
    "chunk": {"sequences": [(21, 150)], "heads": 4, "kv_heads": 2, "dim": 32, "block_tokens": 16, "window": 70},
    "chunk in a large block": {**_SHAPES["single block"], "window": 40},
    "image": {**_SHAPES["prompt, odd"], "window": 0, "ahead": [[(3, 30)], []]},
    "images in a chunk": {
        "sequences": [(1, 9), (60, 130), (9, 9)],
        "heads": 4, "kv_heads": 2, "dim": 32, "block_tokens": 16, "window": 0,
        "ahead": [[], [(70, 75), (76, 110), (129, 129)], [(0, 8)]],
    },
    "images longer than the window": {
        "sequences": [(1, 60), (70, 130)],
        "heads": 2, "kv_heads": 1, "dim": 16, "block_tokens": 8, "window": 12,
        "ahead": [[], [(64, 99), (100, 105)]],
    },
}  # fmt: skip


def _build(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    block_tokens, num_kv_heads, head_dim = shape["block_tokens"], shape["kv_heads"], shape["dim"]
    query_lens, context_lens = zip(*shape["sequences"], strict=True)
    num_blocks = [-(-length // block_tokens) for length in context_lens]
    pool = torch.full((sum(num_blocks) + 1, 2, 2, num_kv_heads, block_tokens, head_dim), float("nan"), dtype=dtype)
    blocks = iter((torch.randperm(sum(num_blocks), generator=generator) + 1).tolist())
    tables_BM = torch.zeros(len(context_lens), max(num_blocks) + 1, dtype=torch.int32)
    for sequence, length in enumerate(context_lens):
        for index in range(num_blocks[sequence]):
            block = tables_BM[sequence, index] = next(blocks)
            filled = min(block_tokens, length - index * block_tokens)
            values = torch.randn(2, num_kv_heads, filled, head_dim, generator=generator)
            pool[block, 1, :, :, :filled] = values.to(dtype)
    query_starts = list(itertools.accumulate(query_lens, initial=0))
    last_visible = None
    if "ahead" in shape:
        last_visible = [
            position for case in zip(shape["sequences"], shape["ahead"], strict=True) for position in _see_ahead(*case)
        ]
    return {
        "q_NHD": torch.randn(query_starts[-1], shape["heads"], head_dim, generator=generator).to(dtype),
        "layer_pool": pool[:, 1],
        "batch": AttentionBatch.build(query_starts, list(context_lens), tables_BM, last_visible),
        "scale": head_dim**-0.5,
    }


def _see_ahead(lens: tuple[int, int], stretches: list[tuple[int, int]]) -> list[int]:
    """For each query token of a sequence the last position that it sees."""
    query_len, context_len = lens
    last = list(range(context_len))
    for first, end in stretches:
        last[first : end + 1] = [end] * (end + 1 - first)
    return last[context_len - query_len :]


def _build_masked(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """With a window, and NaN in the blocks that are before it for all queries."""
    inputs, window = _build(shape, dtype, generator), shape["window"]
    block_tokens = shape["block_tokens"]
    for sequence, (query_len, context_len) in enumerate(shape["sequences"] if window else ()):
        num_unseen = max(0, context_len - query_len + 1 - window) // block_tokens
        for block in inputs["batch"].block_tables_BM[sequence, :num_unseen].tolist():
            inputs["layer_pool"][block] = float("nan")
    return {**inputs, "window": window}


SPECS = (
    OpSpec(
        name="paged_attention",
        schema="paged_attention(q_NHD, layer_pool, batch, scale) -> out_NHD",
        reference=reference.paged_attention,
        kernel="kvrelay_kernels.attention.kernel:paged_attention",
        shapes=_SHAPES,
        build=_build,
        tolerances={**FLOAT_TOLERANCES, torch.float32: Tolerance(2e-5, 2e-5)},
    ),
    OpSpec(
        name="paged_attention in windows and images",
        schema="paged_attention(q_NHD, layer_pool, batch, scale, window) -> out_NHD",
        reference=reference.paged_attention,
        kernel="kvrelay_kernels.attention.kernel:paged_attention",
        shapes=_MASKED_SHAPES,
        build=_build_masked,
        tolerances={**FLOAT_TOLERANCES, torch.float32: Tolerance(2e-5, 2e-5)},
    ),
)
