"""Whole-block copies: the public functions, dispatched by device.

A pool is [num_blocks, ...]; what a block holds does not matter here. Block numbers are a list or an int64
tensor on the pool's device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvrelay_kernels.kv_copy import reference


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


def _as_index(blocks: Sequence[int] | Tensor, pool: Tensor) -> Tensor:
    if isinstance(blocks, Tensor):
        return blocks
    return torch.tensor(blocks, dtype=torch.int64, device=pool.device)
