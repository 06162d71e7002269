"""Packed staging chunks, and the copies between them and the pool: one library call each, without the GIL.

On CPU by numpy's take and indexed store, which copy a whole chunk in one call (a call per run of blocks would ask for
the GIL as often, and wait for the step loop each time). On CUDA by index_select and index_copy_ on a stream of our
own. Only the connector's thread copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvrelay_transfer.pool_memory import PoolMemory

Indices = npt.NDArray[np.int64]
Job = Callable[[], None]
CopyWatch = Callable[[Callable[[], bool], Job], None]  # see UcxWorker.watch_copy

# Large enough for a link's full speed, which a GPU's links reach late.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}


def chunk_bytes_for(memory: PoolMemory) -> int:
    """Whole blocks, at least one, and no more than the pool has."""
    block_bytes = memory.layout.block_bytes
    wanted = CHUNK_BYTES[memory.device] // block_bytes
    return max(1, min(wanted, memory.num_blocks - 1)) * block_bytes


class ChunkPool:
    """At most `limit` chunks, which are allocated when they are first taken."""

    def __init__(self, allocate: Callable[[], Any], limit: int) -> None:
        self._allocate = allocate
        self._free: list[Any] = []
        self._limit = limit
        self.num_taken = 0

    def take(self) -> Any | None:
        """None while all are taken. Raises MemoryError or torch.OutOfMemoryError."""
        if self.num_taken == self._limit:
            return None
        chunk = self._free.pop() if self._free else self._allocate()
        self.num_taken += 1
        return chunk

    def give_back(self, chunk: Any) -> None:
        self.num_taken -= 1
        self._free.append(chunk)


class ChunkCopier(ABC):
    """`then` is called on the connector's thread when the bytes are where they belong, maybe at once."""

    def __init__(self, memory: PoolMemory) -> None:
        self.block_bytes = memory.layout.block_bytes
        self.chunk_bytes = chunk_bytes_for(memory)

    @abstractmethod
    def allocate(self) -> Any:
        """A chunk as bytes [chunk_bytes], of any content."""

    @abstractmethod
    def allocate_blank(self, size_bytes: int) -> Any:
        """Bytes [size_bytes] that have never held anything of the pool."""

    @abstractmethod
    def gather(self, blocks: Indices, chunk: Any, then: Job) -> None: ...

    @abstractmethod
    def scatter(self, chunk: Any, blocks: Indices, then: Job) -> None: ...


class HostCopier(ChunkCopier):
    def __init__(self, memory: PoolMemory) -> None:
        super().__init__(memory)
        self._rows: npt.NDArray[np.uint8] = memory.block_rows.numpy()

    def allocate(self) -> Any:
        return np.empty(self.chunk_bytes, np.uint8)

    def allocate_blank(self, size_bytes: int) -> Any:
        return np.full(size_bytes, 0x5A, np.uint8)  # zeros would all be one page

    def gather(self, blocks: Indices, chunk: Any, then: Job) -> None:
        # With a mode other than "raise", take writes to `out` without a buffer between; the blocks were checked.
        np.take(self._rows, blocks, axis=0, out=self._rows_of(chunk, len(blocks)), mode="clip")
        then()

    def scatter(self, chunk: Any, blocks: Indices, then: Job) -> None:
        self._rows[blocks] = self._rows_of(chunk, len(blocks))
        then()

    def _rows_of(self, chunk: Any, count: int) -> Any:
        return chunk[: count * self.block_bytes].reshape(count, self.block_bytes)


class CudaCopier(ChunkCopier):
    """Blocks that are read are sealed and blocks that are written are the transfer's, so there is nothing on the
    engine's stream to wait for; the engine uses what was written after `then`, thus after the event."""

    def __init__(self, memory: PoolMemory, watch: CopyWatch) -> None:
        super().__init__(memory)
        self._rows = memory.block_rows
        self._device = memory.tensor.device
        self._watch = watch
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def allocate(self) -> Any:
        return torch.empty(self.chunk_bytes, dtype=torch.uint8, device=self._device)

    def allocate_blank(self, size_bytes: int) -> Any:
        blank = torch.zeros(size_bytes, dtype=torch.uint8, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()
        return blank

    def gather(self, blocks: Indices, chunk: Any, then: Job) -> None:
        with torch.cuda.stream(self._stream):
            torch.index_select(self._rows, 0, self._index(blocks), out=self._rows_of(chunk, len(blocks)))
        self._watch(self._ended(), then)

    def scatter(self, chunk: Any, blocks: Indices, then: Job) -> None:
        with torch.cuda.stream(self._stream):
            self._rows.index_copy_(0, self._index(blocks), self._rows_of(chunk, len(blocks)))
        self._watch(self._ended(), then)

    def _index(self, blocks: Indices) -> torch.Tensor:
        return torch.from_numpy(blocks).pin_memory().to(self._device, non_blocking=True)

    def _ended(self) -> Callable[[], bool]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        query: Callable[[], bool] = event.query
        return query

    def _rows_of(self, chunk: Any, count: int) -> Any:
        return chunk[: count * self.block_bytes].view(count, self.block_bytes)


def make_copier(memory: PoolMemory, watch: CopyWatch) -> ChunkCopier:
    return HostCopier(memory) if memory.device == "cpu" else CudaCopier(memory, watch)
