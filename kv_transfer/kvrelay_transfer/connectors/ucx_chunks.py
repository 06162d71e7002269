"""Packed staging chunks, and the copies between them and the pool: one library call each, without the GIL.

On CPU by numpy's take and indexed store, which copy a whole chunk in one call (a call per run of blocks would ask for
the GIL as often, and wait for the step loop each time). On CUDA by index_select and index_copy_ on a stream of our
own. Only the connector's thread copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvrelay_transfer.connectors.base import Blocks
from kvrelay_transfer.cuda_memory import CudaAllocation
from kvrelay_transfer.cuda_runtime import CudaCallError, CudaRuntime
from kvrelay_transfer.pool_memory import PoolMemory

Job = Callable[[], None]


# Large enough for a link's full speed, and small enough for several on their way through a read of the engine.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
# torch copies elements: the wider, the faster.
_WIDE_DTYPES = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)


def chunk_bytes_for(memory: PoolMemory) -> int:
    """Whole blocks, at least one, and no more than the pool has."""
    block_bytes = memory.layout.block_bytes
    wanted = CHUNK_BYTES[memory.device] // block_bytes
    return max(1, min(wanted, memory.num_blocks - 1)) * block_bytes


@dataclass(slots=True, eq=False)
class Chunk:
    """Bytes [chunk_bytes] of any content; `rows` is the same as rows of a block each."""

    memory: Any
    rows: Any
    _wrap: Callable[[Any], Any]
    _wrapped: dict[int, Any] = field(default_factory=dict)

    def first(self, size_bytes: int) -> Any:
        """The first so many bytes, as UCX takes them."""
        wrapped = self._wrapped.get(size_bytes)
        if wrapped is None:
            wrapped = self._wrapped[size_bytes] = self._wrap(self.memory[:size_bytes])
        return wrapped


class ChunkPool:
    """At most `limit` chunks, which are allocated when they are first taken."""

    def __init__(self, allocate: Callable[[], Chunk], limit: int) -> None:
        self._allocate = allocate
        self._free: list[Chunk] = []
        self._limit = limit
        self.num_taken = 0

    def take(self) -> Chunk | None:
        """None while all are taken. Raises MemoryError or RuntimeError, such as torch.OutOfMemoryError."""
        if self.num_taken == self._limit:
            return None
        chunk = self._free.pop() if self._free else self._allocate()
        self.num_taken += 1
        return chunk

    def give_back(self, chunk: Chunk) -> None:
        self.num_taken -= 1
        self._free.append(chunk)


class CopyWatcher(Protocol):
    """What a copier needs of `UcxWorker`."""

    def wrap(self, buffer: Any) -> Any: ...

    def watch_copy(self, is_over: Callable[[], bool], then: Job) -> None: ...


class ChunkCopier(ABC):
    """Used on the connector's thread only, on which `enter` has been called before. `then` is called there when the
    bytes are where they belong, maybe at once."""

    def __init__(self, memory: PoolMemory, watcher: CopyWatcher) -> None:
        self.device = memory.device
        self.block_bytes = memory.layout.block_bytes
        self.chunk_bytes = chunk_bytes_for(memory)
        self._watcher = watcher

    @abstractmethod
    def enter(self) -> None:
        """Makes the calling thread the copier's own."""

    @abstractmethod
    def allocate(self) -> Chunk:
        """Raises MemoryError or RuntimeError."""

    @abstractmethod
    def allocate_blank(self) -> Chunk:
        """One that has never held anything of the pool. Raises as `allocate`."""

    @abstractmethod
    def prepare(self, blocks: Blocks) -> Any:
        """The blocks of a read as `gather` and `scatter` take slices of them. Raises as `allocate`."""

    @abstractmethod
    def gather(self, blocks: Any, chunk: Chunk, then: Job) -> None: ...

    @abstractmethod
    def scatter(self, chunk: Chunk, blocks: Any, then: Job) -> None: ...


class HostCopier(ChunkCopier):
    def __init__(self, memory: PoolMemory, watcher: CopyWatcher) -> None:
        super().__init__(memory, watcher)
        self._rows: npt.NDArray[np.uint8] = memory.block_rows.numpy()

    def enter(self) -> None:
        """Any thread will do."""

    def allocate(self) -> Chunk:
        memory = np.empty(self.chunk_bytes, np.uint8)
        return Chunk(memory, memory.reshape(-1, self.block_bytes), self._watcher.wrap)

    def allocate_blank(self) -> Chunk:
        chunk = self.allocate()
        chunk.memory.fill(0x5A)  # zeros might all be one page
        return chunk

    def prepare(self, blocks: Blocks) -> Any:
        return blocks

    def gather(self, blocks: Any, chunk: Chunk, then: Job) -> None:
        # With a mode other than "raise", take writes to `out` without a buffer between; the blocks were checked.
        np.take(self._rows, blocks, axis=0, out=chunk.rows[: len(blocks)], mode="clip")
        then()

    def scatter(self, chunk: Chunk, blocks: Any, then: Job) -> None:
        self._rows[blocks] = chunk.rows[: len(blocks)]
        then()


class CudaCopier(ChunkCopier):
    """Blocks that are read are sealed and blocks that are written are the transfer's, so there is nothing on the
    engine's stream to wait for; the engine uses what was written after `then`, thus after the event."""

    def __init__(self, memory: PoolMemory, watcher: CopyWatcher) -> None:
        super().__init__(memory, watcher)
        self._cuda_device = memory.tensor.device
        self._runtime = CudaRuntime.load()
        self._dtype = next(dtype for dtype in _WIDE_DTYPES if self.block_bytes % dtype.itemsize == 0)
        self._rows = self._rows_of(memory.block_rows.view(-1))
        # Before the engine's kernels, which take longer than ours.
        self._stream = torch.cuda.Stream(self._cuda_device, priority=-1)  # type: ignore[no-untyped-call]

    def enter(self) -> None:
        torch.cuda.set_device(self._cuda_device)
        torch.cuda.set_stream(self._stream)  # of this thread

    def allocate(self) -> Chunk:
        """By cudaMalloc, now: UCX has seen it then, and takes it for what it is; peers can map it."""
        try:
            allocation = CudaAllocation(self._runtime, self.chunk_bytes, self._cuda_device.index)
        except CudaCallError as error:
            raise MemoryError(str(error)) from error
        memory = torch.as_tensor(allocation, device=self._cuda_device)
        return Chunk(memory, self._rows_of(memory), self._watcher.wrap)

    def allocate_blank(self) -> Chunk:
        chunk = self.allocate()
        chunk.memory.zero_()
        self._stream.synchronize()
        return chunk

    def prepare(self, blocks: Blocks) -> Any:
        # torch keeps pinned memory for the next upload, and gives it out again when this one is over.
        return torch.from_numpy(blocks).pin_memory().to(self._cuda_device, non_blocking=True)

    def gather(self, blocks: Any, chunk: Chunk, then: Job) -> None:
        torch.index_select(self._rows, 0, blocks, out=chunk.rows[: len(blocks)])
        self._watcher.watch_copy(self._ended(), then)

    def scatter(self, chunk: Chunk, blocks: Any, then: Job) -> None:
        self._rows.index_copy_(0, blocks, chunk.rows[: len(blocks)])
        self._watcher.watch_copy(self._ended(), then)

    def _ended(self) -> Callable[[], bool]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        query: Callable[[], bool] = event.query
        return query

    def _rows_of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.view(self._dtype).view(-1, self.block_bytes // self._dtype.itemsize)


def make_copier(memory: PoolMemory, watcher: CopyWatcher) -> ChunkCopier:
    return HostCopier(memory, watcher) if memory.device == "cpu" else CudaCopier(memory, watcher)
