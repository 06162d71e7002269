"""Spec of paged attention. What no token of a context wrote is NaN: whoever uses it is found out."""

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
    return {
        "q_NHD": torch.randn(query_starts[-1], shape["heads"], head_dim, generator=generator).to(dtype),
        "layer_pool": pool[:, 1],
        "batch": AttentionBatch.build(query_starts, list(context_lens), tables_BM),
        "scale": head_dim**-0.5,
    }


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
)
