"""Copies of blocks and rows: the public functions, dispatched by device.

A pool is [num_blocks, ...]; what a block holds does not matter here. Block numbers are a list or an int64
tensor on the pool's device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrelay_kernels.kv_copy import reference
from kvrelay_kernels.kv_copy.rows import RowSpacing


def copy_blocks(pool: Tensor, sources: Sequence[int] | Tensor, destinations: Sequence[int] | Tensor) -> None:
    """Copies block `sources[i]` over block `destinations[i]` of the same pool.

    Destinations are distinct, and none is a source: the order of the copies is not defined.
    """
    sources_B, destinations_B = _as_index(sources, pool), _as_index(destinations, pool)
    if pool.is_cuda:
        from kvrelay_kernels.kv_copy import kernel

        return kernel.copy_blocks(pool, sources_B, destinations_B)
    return reference.copy_blocks(pool, sources_B, destinations_B)


def gather_blocks(pool: Tensor, blocks: Sequence[int] | Tensor, out: Tensor) -> None:
    """Copies the blocks in order into `out` [len(blocks), ...], contiguous and of the pool's dtype."""
    blocks_B = _as_index(blocks, pool)
    if pool.is_cuda:
        from kvrelay_kernels.kv_copy import kernel

        return kernel.gather_blocks(pool, blocks_B, out)
    return reference.gather_blocks(pool, blocks_B, out)


def scatter_blocks(data: Tensor, pool: Tensor, blocks: Sequence[int] | Tensor) -> None:
    """Copies `data` [len(blocks), ...], contiguous and of the pool's dtype, over distinct blocks of the pool."""
    blocks_B = _as_index(blocks, pool)
    if pool.is_cuda:
        from kvrelay_kernels.kv_copy import kernel

        return kernel.scatter_blocks(data, pool, blocks_B)
    return reference.scatter_blocks(data, pool, blocks_B)


def copy_rows(source: Tensor | int, out: Tensor, offsets_2P: Tensor, spacing: RowSpacing, alignment: int) -> None:
    """For each pair p copies the rows that begin at byte `offsets_2P[0, p]` of `source` to `offsets_2P[1, p]` of `out`.

    `source` and `out` are bytes [size]; `source` may be the address of memory that the GPU of `out` can read, such as
    the mapped pool of a peer. `offsets_2P` is int64 on the device of `out`. `alignment` (1, 2, 4, 8 or 16) divides both
    addresses, all offsets, strides and `row_bytes`. Rows of `out` do not overlap, and nothing here checks that rows lie
    within their buffers.
    """
    if out.is_cuda:
        from kvrelay_kernels.kv_copy import kernel

        return kernel.copy_rows(source, out, offsets_2P, spacing, alignment)
    assert isinstance(source, Tensor), "bare addresses are for GPUs"
    return reference.copy_rows(source, out, offsets_2P, spacing, alignment)


def _as_index(blocks: Sequence[int] | Tensor, pool: Tensor) -> Tensor:
    if isinstance(blocks, Tensor):
        return blocks
    return torch.tensor(blocks, dtype=torch.int64, device=pool.device)
