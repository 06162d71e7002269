"""Spec of the rotary position embedding."""

from __future__ import annotations

import torch

from kvrelay_kernels.rope import reference
from kvrelay_kernels.spec import FLOAT_TOLERANCES, Inputs, OpSpec, Shape


def _build(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    num_tokens, num_heads, num_kv_heads, head_dim = (shape[name] for name in ("tokens", "heads", "kv_heads", "dim"))
    # Slices of one projection, as the models pass them.
    qkv_NHD = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    angles_PC = torch.rand(50, head_dim // 2, generator=generator) * 6
    return {
        "q_NHD": qkv_NHD[:, :num_heads],
        "k_NKD": qkv_NHD[:, num_heads : num_heads + num_kv_heads],
        "positions_N": torch.randint(0, 50, (num_tokens,), generator=generator),
        "cos_sin_PD": torch.cat((angles_PC.cos(), angles_PC.sin()), dim=-1),
    }


SPECS = (
    OpSpec(
        name="apply_rope",
        schema="apply_rope(q_NHD, k_NKD, positions_N, cos_sin_PD) -> (q_NHD, k_NKD)",
        reference=reference.apply_rope,
        kernel="kvrelay_kernels.rope.kernel:apply_rope",
        shapes={
            "aligned": {"tokens": 4, "heads": 4, "kv_heads": 2, "dim": 64},
            "odd": {"tokens": 5, "heads": 3, "kv_heads": 3, "dim": 80},
            "single token": {"tokens": 1, "heads": 8, "kv_heads": 1, "dim": 16},
            "empty": {"tokens": 0, "heads": 2, "kv_heads": 1, "dim": 16},
        },
        build=_build,
        tolerances=FLOAT_TOLERANCES,
    ),
)
