"""Rotary position embedding in Triton; also runs in Triton's interpreter on the CPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, token, stride_token, stride_head, cos, sin, NUM_HEADS: tl.constexpr, HEADS_TILE: tl.constexpr,
    HALF: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, HEADS_TILE)
    columns = tl.arange(0, HALF_TILE)
    mask = (heads < NUM_HEADS)[:, None] & (columns < HALF)[None, :]
    x_offset = token * stride_token + heads[:, None] * stride_head + columns[None, :]
    first = tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + x_offset + HALF, mask=mask, other=0.0).to(tl.float32)
    out_offset = (token * NUM_HEADS + heads[:, None]) * (2 * HALF) + columns[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + out_offset, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out_ptr + out_offset + HALF, (second * cos + first * sin).to(dtype), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, positions_ptr, cos_sin_ptr, q_out_ptr, k_out_ptr,
    q_stride_token, q_stride_head, k_stride_token, k_stride_head,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS_TILE: tl.constexpr, KV_HEADS_TILE: tl.constexpr,
    HALF: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    columns = tl.arange(0, HALF_TILE)
    row_ptr = cos_sin_ptr + position * (2 * HALF) + columns
    cos = tl.load(row_ptr, mask=columns < HALF, other=0.0)[None, :]
    sin = tl.load(row_ptr + HALF, mask=columns < HALF, other=0.0)[None, :]
    _rotate_heads(
        q_ptr, q_out_ptr, token, q_stride_token, q_stride_head, cos, sin, NUM_HEADS, HEADS_TILE, HALF, HALF_TILE
    )
    _rotate_heads(
        k_ptr, k_out_ptr, token, k_stride_token, k_stride_head, cos, sin, NUM_KV_HEADS, KV_HEADS_TILE, HALF, HALF_TILE
    )


def apply_rope(q_NHD: Tensor, k_NKD: Tensor, positions_N: Tensor, cos_sin_PD: Tensor) -> tuple[Tensor, Tensor]:
    """See `kvrelay_kernels.rope.op.apply_rope`."""
    num_tokens, num_heads, head_dim = q_NHD.shape
    num_kv_heads = k_NKD.shape[1]
    assert q_NHD.stride(-1) == k_NKD.stride(-1) == 1 and cos_sin_PD.is_contiguous()
    q_out_NHD = torch.empty(q_NHD.shape, dtype=q_NHD.dtype, device=q_NHD.device)
    k_out_NKD = torch.empty(k_NKD.shape, dtype=k_NKD.dtype, device=k_NKD.device)
    if num_tokens:
        _rope_kernel[(num_tokens,)](
            q_NHD,
            k_NKD,
            positions_N,
            cos_sin_PD,
            q_out_NHD,
            k_out_NKD,
            q_NHD.stride(0),
            q_NHD.stride(1),
            k_NKD.stride(0),
            k_NKD.stride(1),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEADS_TILE=triton.next_power_of_2(num_heads),
            KV_HEADS_TILE=triton.next_power_of_2(num_kv_heads),
            HALF=head_dim // 2,
            HALF_TILE=triton.next_power_of_2(head_dim // 2),
        )
    return q_out_NHD, k_out_NKD
