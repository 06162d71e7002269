"""Which blocks of a pool hold which media item's embedding: a byte-budgeted LRU over preallocated memory.

An item is found by its content hash. It stays as long as somebody holds it, and after that until its blocks are the
oldest that nobody holds; then it goes whole. The fence word of a block is bumped before the block is written again, so
a reader that comes too late sees it (PROTOCOL A1). Knows nothing of leases, tickets or towers; whose pool it is - the
encoder's, or that of a reader - makes no difference here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrelay_engine.block_pool import NULL_BLOCK, BlockPool
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.pool_memory import PoolMemory


@dataclass(frozen=True, slots=True, eq=False)
class CachedItem:
    """Rows [num_tokens, hidden] in `blocks`, in token order; `words` as they were when the rows were complete."""

    content_hash: bytes
    blocks: tuple[int, ...]
    words: tuple[int, ...]
    num_tokens: int


class EmbeddingCache:
    def __init__(self, memory: PoolMemory, layout: EmbeddingLayout) -> None:
        """`memory` is a pool of `layout` in host memory."""
        assert memory.layout == layout and memory.device == "cpu"
        self.layout = layout
        self._tensor = memory.tensor
        self.pool = BlockPool(memory.num_blocks, memory.words)
        self._items: dict[bytes, CachedItem] = {}
        self._item_of: dict[int, CachedItem] = {}  # by block
        self.num_evicted = 0

    # ------------------------------------------------------------------------------------------- queries

    @property
    def num_items(self) -> int:
        return len(self._items)

    @property
    def num_blocks(self) -> int:
        """That an item may use."""
        return self.pool.num_blocks - 1

    @property
    def num_cached_blocks(self) -> int:
        return len(self._item_of)

    def find(self, content_hash: bytes) -> CachedItem | None:
        """The item counts as used now."""
        item = self._items.get(content_hash)
        if item is not None:
            self.pool.pin(item.blocks)
            self.pool.release(item.blocks)
        return item

    def rows(self, item: CachedItem, first: int, count: int) -> Tensor:
        """A copy of rows [first, first + count) of an item that is held: [count, hidden]."""
        block_tokens = self.layout.block_tokens
        skipped = first // block_tokens
        blocks = item.blocks[skipped : self.layout.blocks_for(first + count)]
        rows = self._tensor[torch.tensor(blocks, dtype=torch.int64)].view(-1, self.layout.hidden_size)
        start = first - skipped * block_tokens
        return rows[start : start + count]

    # ------------------------------------------------------------------------------- reserve, fill, publish

    def reserve(self, num_tokens: int) -> tuple[int, ...] | None:
        """Blocks to write an item to, held by the caller; None when too many are held by others. Items whose blocks
        are taken are gone."""
        count = self.layout.blocks_for(num_tokens)
        if count > self.pool.num_free:
            return None
        blocks = tuple(self.pool.reserve(count))
        for block in blocks:
            self._evict(block)
        return blocks

    def write(self, blocks: tuple[int, ...], rows: Tensor) -> None:
        """`rows` [num_tokens, hidden], on any device; they are in the pool when it returns."""
        block_tokens = self.layout.block_tokens
        on_host = rows.to("cpu", self._tensor.dtype)
        for position, block in enumerate(blocks):
            part = on_host[position * block_tokens : (position + 1) * block_tokens]
            self._tensor[block, : len(part)] = part

    def publish(self, content_hash: bytes, blocks: tuple[int, ...], num_tokens: int) -> CachedItem:
        """The rows are complete. The caller's hold of the blocks is now one of the item, to be dropped some time.

        Where the item is here already, that one is kept for others; this one goes with its last hold.
        """
        words = tuple(self.pool.word(block) for block in blocks)
        item = CachedItem(content_hash, blocks, words, num_tokens)
        if content_hash not in self._items:
            self._items[content_hash] = item
            self._item_of.update(dict.fromkeys(blocks, item))
        return item

    def hold(self, item: CachedItem) -> None:
        """The item stays until it is dropped as often as it was held. It is one that was just found or is held."""
        self.pool.pin(item.blocks)

    def drop(self, item: CachedItem) -> None:
        self.pool.release(item.blocks)

    def give_back(self, blocks: Iterable[int]) -> None:
        """Reserved blocks that hold no item after all."""
        self.pool.release(blocks)

    def _evict(self, block: int) -> None:
        item = self._item_of.get(block)
        if item is None:
            return
        del self._items[item.content_hash]
        for other in item.blocks:
            del self._item_of[other]
        self.num_evicted += 1

    # ----------------------------------------------------------------------------------------- accounting

    def check_integrity(self, held: Counter[int]) -> None:
        """Asserts that every block is in one state, that each item's rows are as they were published, and that nobody
        but `held` (references by block) holds anything."""
        self.pool.check_integrity()
        for item in self._items.values():
            assert item.words == tuple(map(self.pool.word, item.blocks)), "blocks of a cached item were reused"
            assert all(self._item_of[block] is item for block in item.blocks)
        assert len(self._item_of) == sum(len(item.blocks) for item in self._items.values())
        for block in range(NULL_BLOCK + 1, self.pool.num_blocks):
            references = self.pool.references(block)
            assert references == held[block], f"block {block} has {references} references, {held[block]} are known"
