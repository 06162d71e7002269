"""Spec of the writes into the pool."""

from __future__ import annotations

import torch

from kvrelay_kernels.kv_cache import reference
from kvrelay_kernels.spec import EXACT, FLOAT_TOLERANCES, Inputs, OpSpec, Shape

_NUM_BLOCKS = 5


def _build(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    num_tokens, num_heads, head_dim = shape["tokens"], shape["heads"], shape["dim"]
    block_tokens = shape["block_tokens"]
    kv_N2KD = torch.randn(num_tokens, 2, num_heads, head_dim, generator=generator).to(dtype)
    pool = torch.randn(_NUM_BLOCKS, 3, 2, num_heads, block_tokens, head_dim, generator=generator).to(dtype)
    return {
        "k_NKD": kv_N2KD[:, 0],
        "v_NKD": kv_N2KD[:, 1],
        "layer_pool": pool[:, 1],
        "slots_N": torch.randperm(_NUM_BLOCKS * block_tokens, generator=generator)[:num_tokens],
    }


SPECS = (
    OpSpec(
        name="write_kv",
        schema="write_kv(k_NKD, v_NKD, layer_pool, slots_N) -> None",
        reference=reference.write_kv,
        kernel="kvrelay_kernels.kv_cache.kernel:write_kv",
        shapes={
            "aligned": {"tokens": 8, "heads": 4, "dim": 64, "block_tokens": 8},
            "odd": {"tokens": 7, "heads": 3, "dim": 80, "block_tokens": 4},
            "single token": {"tokens": 1, "heads": 2, "dim": 16, "block_tokens": 64},
            "blocks of one token": {"tokens": 4, "heads": 1, "dim": 16, "block_tokens": 1},
            "empty": {"tokens": 0, "heads": 2, "dim": 16, "block_tokens": 4},
        },
        build=_build,
        tolerances=dict.fromkeys(FLOAT_TOLERANCES, EXACT),
        changed=("layer_pool",),
    ),
)
