"""KV chunks between the blocks of a pool and the parts of records, with the fence for those that leave.

The pool may be on CPU or CUDA: `part_copier` is where that is decided. Knows blocks and words, no sequences; who calls
knows that the blocks hold the chunk, in order, when it asks for a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from kvrelay_transfer.fence import agree
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.part_key import KeyMaker
from kvrelay_transfer.tiers.records import Record


class PartCopier(Protocol):
    """Both are called by several threads, and the bytes are where they should be when they return."""

    def copy_out(self, blocks: Sequence[int], part: int, into: memoryview) -> None:
        """`into` is as long as the part."""

    def copy_in(self, blocks: Sequence[int], part: int, raw: memoryview) -> None: ...


def part_copier(memory: PoolMemory, chunks: KvChunks) -> PartCopier:
    return CudaPartCopier(memory, chunks) if memory.device == "cuda" else CpuPartCopier(memory, chunks)


class KvRecords:
    """Chunks of the pool's KV as records, under the keys of one namespace."""

    def __init__(self, memory: PoolMemory, chunks: KvChunks, keys: KeyMaker) -> None:
        self.chunks = chunks
        self._memory = memory
        self._keys = keys
        self._copier = part_copier(memory, chunks)

    def record(self, content_hash: bytes) -> Record:
        """Of the chunk whose chained hash this is."""
        keys = tuple(self._keys.key(content_hash, part) for part in range(self.chunks.num_parts))
        return Record(keys, self.chunks.part_bytes)

    def source(self, blocks: Sequence[int]) -> KvRecordSource:
        """Of the chunk that `blocks` hold now: their words are noted. On the thread that gives blocks away."""
        assert len(blocks) == self.chunks.num_blocks
        return KvRecordSource(self._memory, self._copier, blocks)

    def destination(self, blocks: Sequence[int]) -> KvRecordDestination:
        """`blocks` are the fetch's until it is terminal."""
        assert len(blocks) == self.chunks.num_blocks
        return KvRecordDestination(self._copier, blocks)


class KvRecordSource:
    def __init__(self, memory: PoolMemory, copier: PartCopier, blocks: Sequence[int]) -> None:
        self._copier = copier
        self._blocks = tuple(blocks)
        self._numbers = np.array(self._blocks, np.int64)
        self._words_now = memory.words.read_after_copy
        self._words = self._words_now(self._numbers)

    def copy_out(self, part: int, into: memoryview) -> None:
        self._copier.copy_out(self._blocks, part, into)

    def is_intact(self) -> bool:
        """Behind a memory fence: whatever was copied before, on this thread, is what the words speak of."""
        return agree(self._words, self._words_now(self._numbers))


class KvRecordDestination:
    def __init__(self, copier: PartCopier, blocks: Sequence[int]) -> None:
        self._copier = copier
        self._blocks = tuple(blocks)

    def copy_in(self, part: int, raw: memoryview) -> None:
        self._copier.copy_in(self._blocks, part, raw)


class CpuPartCopier:
    """By strided copies of numpy, block by block, which release the GIL and run at 80 to 100 % of memcpy."""

    def __init__(self, memory: PoolMemory, chunks: KvChunks) -> None:
        self._chunks = chunks
        rows = 2 * chunks.layout.num_kv_heads
        self._pool = memory.block_rows.numpy().reshape(memory.num_blocks, chunks.layout.num_layers, rows, -1)

    def copy_out(self, blocks: Sequence[int], part: int, into: memoryview) -> None:
        first, end = self._chunks.layers(part)
        rows = np.frombuffer(into, np.uint8).reshape(end - first, self._pool.shape[2], len(blocks), -1)
        for position, block in enumerate(blocks):
            rows[:, :, position] = self._pool[block, first:end]

    def copy_in(self, blocks: Sequence[int], part: int, raw: memoryview) -> None:
        first, end = self._chunks.layers(part)
        rows = np.frombuffer(raw, np.uint8).reshape(end - first, self._pool.shape[2], len(blocks), -1)
        for position, block in enumerate(blocks):
            self._pool[block, first:end] = rows[:, :, position]


class CudaPartCopier:
    """Through a tensor on the GPU in the part's order, on streams beside the engine's, one for each direction; `into`
    and `raw` are pinned, else copies over the bus wait for each other."""

    def __init__(self, memory: PoolMemory, chunks: KvChunks) -> None:
        self._chunks = chunks
        rows = 2 * chunks.layout.num_kv_heads
        # Copies need no dtype, and wide elements make them fast.
        self._dtype = torch.int64 if chunks.row_bytes % 8 == 0 else torch.uint8
        self._pool = memory.block_rows.view(self._dtype).view(memory.num_blocks, chunks.layout.num_layers, rows, -1)
        self._out = torch.cuda.Stream(self._pool.device)  # type: ignore[no-untyped-call]
        self._in = torch.cuda.Stream(self._pool.device)  # type: ignore[no-untyped-call]

    def copy_out(self, blocks: Sequence[int], part: int, into: memoryview) -> None:
        first, end = self._chunks.layers(part)
        with torch.cuda.stream(self._out):
            gathered = torch.stack([self._pool[block, first:end] for block in blocks], dim=2)
            torch.frombuffer(into, dtype=self._dtype).copy_(gathered.view(-1), non_blocking=True)
            self._finish(self._out)

    def copy_in(self, blocks: Sequence[int], part: int, raw: memoryview) -> None:
        first, end = self._chunks.layers(part)
        with torch.cuda.stream(self._in):
            sent = torch.frombuffer(raw, dtype=self._dtype).to(self._pool.device, non_blocking=True)
            rows = sent.view(end - first, self._pool.shape[2], len(blocks), -1)
            for position, block in enumerate(blocks):
                self._pool[block, first:end].copy_(rows[:, :, position])
            self._finish(self._in)

    def _finish(self, stream: torch.cuda.Stream) -> None:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)
        done.synchronize()
