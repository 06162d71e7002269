"""Which bytes of a source's blocks go where in ours, when the two pools cut the same KV differently: a plan as data.

A block is `[layers, 2, kv_heads, block_tokens, head_dim]`. Of two pools with other block sizes or other ranks, a
*pair* is a block of the source and one of ours that have tokens and heads in common; its rows are the spans that are
contiguous on both sides. All pairs of a plan have rows of one shape and differ in where they begin only.

More ranks than KV heads: neighbouring ranks hold copies of one head. A reader takes one of the copies, the n-th of n
readers another one each, so that they do not all pull from the same rank.

Positions are in token order, as a ticket lists its blocks; block numbers, words and pools are the caller's. No I/O.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from kvrelay_transfer.connectors.base import Blocks, BlockSlices, SliceShape
from kvrelay_transfer.layout import ELEMENT_BYTES, KvLayout


class BlockPairs(Struct, frozen=True):
    """The source's block at position remote[i] goes to ours at local[i]: whole, or the rows that `slices` name."""

    remote: Blocks
    local: Blocks
    slices: BlockSlices | None


class RankPlan(Struct, frozen=True):
    """What one rank of the source has for our rank."""

    source_rank: int
    shape: SliceShape | None  # None: whole blocks
    pair_bytes: int  # that a pair moves
    remote_tokens: int  # in a block of the source
    local_tokens: int
    token_bytes: int  # of one head
    remote_start: int  # byte offset of the first common head in a block
    local_start: int

    def pair(self, first: int, end: int, num_tokens: int, first_token: int = 0) -> BlockPairs:
        """The pairs for blocks [first, end) of the source, as far as they hold tokens [first_token, num_tokens).

        `first_token` is where one of our blocks begins. The rest of a last, partial block comes along as far as the
        smaller of the two blocks reaches.
        """
        begin = max(first * self.remote_tokens, first_token)
        stop = min(end * self.remote_tokens, num_tokens)
        tokens = np.arange(begin, stop, min(self.remote_tokens, self.local_tokens))
        remote, remote_skip = np.divmod(tokens, self.remote_tokens)
        local, local_skip = np.divmod(tokens, self.local_tokens)
        slices = None
        if self.shape is not None:
            remote_offsets = self.remote_start + remote_skip * self.token_bytes
            local_offsets = self.local_start + local_skip * self.token_bytes
            slices = BlockSlices(self.shape, remote_offsets, local_offsets)
        return BlockPairs(remote, local, slices)


def plan_ranks(source: KvLayout, reader: KvLayout) -> tuple[RankPlan, ...]:
    """One plan for each rank of the source that the reader's rank has to read; `source.tp_rank` does not matter.

    Raises MismatchError when the two do not hold the same content.
    """
    reader.check_compatible(source)
    num_heads = reader.common_heads(source)
    ours = _heads_of(reader, reader.tp_rank, num_heads)
    copies = source.num_kv_heads * source.tp_size // num_heads
    plans = []
    for rank in range(reader.tp_rank % copies, source.tp_size, copies):
        theirs = _heads_of(source, rank, num_heads)
        first, stop = max(ours.start, theirs.start), min(ours.stop, theirs.stop)
        if first < stop:
            plans.append(_plan_rank(source, reader, rank, (first - theirs.start, first - ours.start, stop - first)))
    return tuple(plans)


def _heads_of(layout: KvLayout, rank: int, num_heads: int) -> range:
    """Of the model's KV heads, those that the rank holds."""
    copies = layout.num_kv_heads * layout.tp_size // num_heads
    first = rank // copies * layout.num_kv_heads
    return range(first, first + layout.num_kv_heads)


def _plan_rank(source: KvLayout, reader: KvLayout, rank: int, heads: tuple[int, int, int]) -> RankPlan:
    """`heads`: the first common head's place in a block of the source and in ours, and how many there are."""
    remote_head, local_head, num_heads = heads
    token_bytes = reader.head_dim * ELEMENT_BYTES[reader.dtype]
    remote_head_bytes, local_head_bytes = source.block_tokens * token_bytes, reader.block_tokens * token_bytes
    is_whole_head = source.block_tokens == reader.block_tokens
    shape = SliceShape(
        outer=reader.num_layers * 2,
        inner=1 if is_whole_head else num_heads,
        row_bytes=num_heads * local_head_bytes if is_whole_head else min(remote_head_bytes, local_head_bytes),
        remote_outer_stride=source.num_kv_heads * remote_head_bytes,
        remote_inner_stride=remote_head_bytes,
        local_outer_stride=reader.num_kv_heads * local_head_bytes,
        local_inner_stride=local_head_bytes,
    )
    return RankPlan(
        source_rank=rank,
        shape=shape if reader.needs_slices(source) else None,
        pair_bytes=shape.size_bytes,
        remote_tokens=source.block_tokens,
        local_tokens=reader.block_tokens,
        token_bytes=token_bytes,
        remote_start=remote_head * remote_head_bytes,
        local_start=local_head * local_head_bytes,
    )
