"""Copies of KV blocks and of rows in them: inside the pool, into a contiguous buffer, from the pool of a peer."""

from kvrelay_kernels.kv_copy.op import copy_blocks, copy_rows, gather_blocks, scatter_blocks

__all__ = ["copy_blocks", "copy_rows", "gather_blocks", "scatter_blocks"]
