"""KV of one prompt as one tensor, and the naive way in which ranks and blocks cut it: by reshaping.

`kv` is bytes [layers, 2, heads, tokens, head_bytes] of the whole model, all ranks together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from kvrelay_transfer.connectors.base import Blocks, BlockSlices
from kvrelay_transfer.layout import ELEMENT_BYTES, KvLayout

Bytes = npt.NDArray[np.uint8]
PADDING = 0xEE  # what a source has behind the last token


def make_kv(layout: KvLayout, num_heads: int, num_tokens: int, seed: int = 0) -> Bytes:
    head_bytes = layout.head_dim * ELEMENT_BYTES[layout.dtype]
    shape = (layout.num_layers, 2, num_heads, num_tokens, head_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rank_layout(layout: KvLayout, num_heads: int, block_tokens: int, tp_size: int, tp_rank: int) -> KvLayout:
    """That of one rank; more ranks than heads hold copies."""
    return replace(
        layout,
        num_kv_heads=max(1, num_heads // tp_size),
        block_tokens=block_tokens,
        tp_size=tp_size,
        tp_rank=tp_rank,
    )


def heads_of(kv: Bytes, layout: KvLayout) -> Bytes:
    """What of `kv` is this rank's."""
    first = layout.tp_rank * kv.shape[2] // layout.tp_size
    return kv[:, :, first : first + layout.num_kv_heads]


def cut(kv: Bytes, layout: KvLayout) -> Bytes:
    """The rank's blocks [blocks, block_bytes] in token order."""
    mine = heads_of(kv, layout)
    num_blocks = layout.blocks_for(kv.shape[3])
    padding = num_blocks * layout.block_tokens - kv.shape[3]
    padded = np.pad(mine, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)), constant_values=PADDING)
    layers, _, heads, _, head_bytes = padded.shape
    blocks = padded.reshape(layers, 2, heads, num_blocks, layout.block_tokens, head_bytes)
    return np.ascontiguousarray(blocks.transpose(3, 0, 1, 2, 4, 5)).reshape(num_blocks, layout.block_bytes)


def glue(blocks: Bytes, layout: KvLayout, num_tokens: int) -> Bytes:
    """The inverse of `cut`: [layers, 2, heads of the rank, num_tokens, head_bytes]."""
    head_bytes = layout.head_dim * ELEMENT_BYTES[layout.dtype]
    shape = (len(blocks), layout.num_layers, 2, layout.num_kv_heads, layout.block_tokens, head_bytes)
    tokens = blocks.reshape(shape).transpose(1, 2, 3, 0, 4, 5)
    flat = tokens.reshape(layout.num_layers, 2, layout.num_kv_heads, len(blocks) * layout.block_tokens, head_bytes)
    return flat[:, :, :, :num_tokens]


def copy_rows(source: Bytes, remote_blocks: Blocks, target: Bytes, local_blocks: Blocks, slices: BlockSlices) -> None:
    """Row by row, as the words of `BlockSlices` say; both sides are [blocks, block_bytes]."""
    shape = slices.shape
    for pair, (remote, local) in enumerate(zip(remote_blocks, local_blocks, strict=True)):
        for outer in range(shape.outer):
            for inner in range(shape.inner):
                begin = slices.remote_offsets[pair]
                begin += outer * shape.remote_outer_stride + inner * shape.remote_inner_stride
                to = slices.local_offsets[pair]
                to += outer * shape.local_outer_stride + inner * shape.local_inner_stride
                row = source[remote, begin : begin + shape.row_bytes]
                assert len(row) == len(target[local, to : to + shape.row_bytes]) == shape.row_bytes
                target[local, to : to + shape.row_bytes] = row
