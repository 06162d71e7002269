"""Whole-block copies in torch: the CPU path and the oracle of the kernel.

`index_select` and `index_copy_` move a block as one span (11-20 GB/s); fancy indexing does 0.3-0.9 GB/s.
"""

from __future__ import annotations

import torch
from torch import Tensor


def copy_blocks(pool: Tensor, sources_B: Tensor, destinations_B: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.copy_blocks`."""
    pool.index_copy_(0, destinations_B, pool.index_select(0, sources_B))


def gather_blocks(pool: Tensor, blocks_B: Tensor, out: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.gather_blocks`."""
    torch.index_select(pool, 0, blocks_B, out=out)


def scatter_blocks(data: Tensor, pool: Tensor, blocks_B: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.scatter_blocks`."""
    pool.index_copy_(0, blocks_B, data)
