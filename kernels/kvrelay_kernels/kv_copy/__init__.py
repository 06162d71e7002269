"""Copies of whole KV blocks, inside the pool and between it and a contiguous buffer."""

from kvrelay_kernels.kv_copy.op import copy_blocks, gather_blocks, scatter_blocks

__all__ = ["copy_blocks", "gather_blocks", "scatter_blocks"]
