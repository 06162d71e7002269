"""Writes keys and values into pool slots in Triton; also runs in Triton's interpreter on the CPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_kv_kernel(
    k_ptr, v_ptr, pool_ptr, slots_ptr, k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    block_stride, plane_stride,
    BLOCK_TOKENS: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    heads = tl.arange(0, HEADS_TILE)[:, None]
    columns = tl.arange(0, DIM_TILE)[None, :]
    mask = (heads < NUM_HEADS) & (columns < HEAD_DIM)
    k = tl.load(k_ptr + token * k_stride_token + heads * k_stride_head + columns, mask=mask)
    v = tl.load(v_ptr + token * v_stride_token + heads * v_stride_head + columns, mask=mask)
    row_ptr = pool_ptr + (slot // BLOCK_TOKENS) * block_stride + (slot % BLOCK_TOKENS) * HEAD_DIM
    offset = heads * (BLOCK_TOKENS * HEAD_DIM) + columns
    tl.store(row_ptr + offset, k, mask=mask)
    tl.store(row_ptr + plane_stride + offset, v, mask=mask)


def write_kv(k_NKD: Tensor, v_NKD: Tensor, layer_pool: Tensor, slots_N: Tensor) -> None:
    """See `kvrelay_kernels.kv_cache.op.write_kv`."""
    num_tokens, num_heads, head_dim = k_NKD.shape
    assert k_NKD.stride(-1) == v_NKD.stride(-1) == 1
    if num_tokens:
        _write_kv_kernel[(num_tokens,)](
            k_NKD,
            v_NKD,
            layer_pool,
            slots_N,
            k_NKD.stride(0),
            k_NKD.stride(1),
            v_NKD.stride(0),
            v_NKD.stride(1),
            layer_pool.stride(0),
            layer_pool.stride(1),
            BLOCK_TOKENS=layer_pool.shape[3],
            NUM_HEADS=num_heads,
            HEADS_TILE=triton.next_power_of_2(num_heads),
            HEAD_DIM=head_dim,
            DIM_TILE=triton.next_power_of_2(head_dim),
        )
