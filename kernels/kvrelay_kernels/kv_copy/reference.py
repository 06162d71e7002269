"""Copies of blocks and rows in torch: the CPU path and the oracle of the kernels.

`index_select` and `index_copy_` move a block as one span (11-20 GB/s); fancy indexing does 0.3-0.9 GB/s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvrelay_kernels.kv_copy.rows import RowSpacing


def copy_blocks(pool: Tensor, sources_B: Tensor, destinations_B: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.copy_blocks`."""
    pool.index_copy_(0, destinations_B, pool.index_select(0, sources_B))


def gather_blocks(pool: Tensor, blocks_B: Tensor, out: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.gather_blocks`."""
    torch.index_select(pool, 0, blocks_B, out=out)


def scatter_blocks(data: Tensor, pool: Tensor, blocks_B: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.scatter_blocks`."""
    pool.index_copy_(0, blocks_B, data)


def copy_rows(source: Tensor, out: Tensor, offsets_2P: Tensor, spacing: RowSpacing, alignment: int) -> None:
    """See `kvrelay_kernels.kv_copy.op.copy_rows`."""
    size = (spacing.outer, spacing.inner, spacing.row_bytes)
    source_strides = (spacing.source_outer_stride, spacing.source_inner_stride, 1)
    out_strides = (spacing.out_outer_stride, spacing.out_inner_stride, 1)
    for source_offset, out_offset in offsets_2P.t().tolist():
        rows = source.as_strided(size, source_strides, source.storage_offset() + source_offset)
        out.as_strided(size, out_strides, out.storage_offset() + out_offset).copy_(rows)
