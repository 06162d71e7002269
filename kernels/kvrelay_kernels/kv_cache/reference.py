"""Writes keys and values into pool slots in torch: the CPU path and the oracle of the kernel."""

from __future__ import annotations

from torch import Tensor


def write_kv(k_NKD: Tensor, v_NKD: Tensor, layer_pool: Tensor, slots_N: Tensor) -> None:
    """See `kvrelay_kernels.kv_cache.op.write_kv`."""
    num_blocks, _, num_heads, block_tokens, head_dim = layer_pool.shape
    block_rows = layer_pool.stride(0) // head_dim
    blocks_N = slots_N.div(block_tokens, rounding_mode="floor")
    rows_N = slots_N.add(blocks_N, alpha=block_rows - block_tokens)
    # Row r starts at vector r of the pool and takes one vector from each head's plane. Rows of this view
    # overlap, those of distinct slots do not. One index_copy_ of tokens is twice as fast as indexing by
    # (block, offset) or by (slot, head).
    shape = ((num_blocks - 1) * block_rows + block_tokens, num_heads, head_dim)
    stride = (head_dim, block_tokens * head_dim, 1)
    for plane, values_NKD in enumerate((k_NKD, v_NKD)):
        first = layer_pool.storage_offset() + plane * layer_pool.stride(1)
        layer_pool.as_strided(shape, stride, first).index_copy_(0, rows_N, values_NKD)
