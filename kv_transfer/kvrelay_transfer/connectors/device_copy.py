"""Copies from a peer's mapped pool into ours, on a stream of their own beside the engine's.

Two ways, which this module chooses between: the copy engines (`cudaMemcpyBatchAsync`, no multiprocessors taken) for
long spans, a gather kernel on a few multiprocessors for short and for sliced ones. Knows blocks, no peers and no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from kvrelay_kernels.kv_copy.rows import RowSpacing
from kvrelay_transfer.connectors.base import Blocks, BlockSlices
from kvrelay_transfer.connectors.block_runs import merge_runs
from kvrelay_transfer.connectors.offset_tables import OffsetTables
from kvrelay_transfer.cuda_runtime import CudaRuntime
from kvrelay_transfer.pool_memory import PoolMemory

# From this mean span on the copy engines are the better way. Posting takes the engine's thread 0.75 us a span: 0.4 ms
# for 512 MiB at this size, which a decode step pays for as it does for the multiprocessors that the kernel takes; at
# half of it posting is slower than copying (two H200s, bench/transfer.py, docs/adr/0014).
MIN_ENGINE_SPAN_BYTES = 1 << 20
# Bytes of the first batch for the engines, and how many times as many are in each following one. They begin when a call
# has returned, and copy a span of the least size in four times the time that posting it takes. (The kernel is launched
# once: of several launches each would wait for its own table to come over the bus, and the link with it.)
_FIRST_BATCH_BYTES, _BATCH_GROWTH = 8 << 20, 4
# Rows of these lengths (bytes) are the kernel's classes; it is compiled for them before the first step.
_WARM_ROW_BYTES = (16 << 10, 1 << 10, 128)


@dataclass(frozen=True, slots=True)
class MappedPool:
    """A peer's pool as our GPU sees it."""

    address: int
    block_bytes: int


class DeviceCopier:
    def __init__(self, runtime: CudaRuntime, memory: PoolMemory) -> None:
        """Compiles the kernel, which takes seconds where no earlier start left it in Triton's cache."""
        self._runtime = runtime
        self._block_bytes = memory.layout.block_bytes
        self._pool = memory.block_rows.view(-1)
        self.device = self._pool.device
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._tables = OffsetTables(runtime, self.stream)
        from kvrelay_kernels.kv_copy.row_copier import RowCopier  # needs Triton, which hosts without a GPU lack

        self._rows = RowCopier(self.stream)
        self._warm_up()

    def copy_blocks(self, source: MappedPool, remote: Blocks, local: Blocks) -> torch.cuda.Event:
        """Posts the copy of whole blocks of equal size. The event fires when all bytes are here."""
        if len(remote) == 0:
            return self._event()
        runs = merge_runs(remote, local)
        if self._runtime.can_batch and len(remote) * self._block_bytes >= MIN_ENGINE_SPAN_BYTES * len(runs[0]):
            return self.copy_by_engines(source, *runs)
        return self.copy_by_kernel(source, remote, local)

    def copy_by_engines(self, source: MappedPool, remote: Blocks, local: Blocks, counts: Blocks) -> torch.cuda.Event:
        """One span for each run of blocks, posted in batches: the first is under way while the rest is posted."""
        sources = (source.address + remote * self._block_bytes).view(np.uint64)
        destinations = (self._pool.data_ptr() + local * self._block_bytes).view(np.uint64)
        sizes_bytes = (counts * self._block_bytes).view(np.uint64)
        mean_bytes = int(sizes_bytes.sum()) // len(counts)
        with self._current_device():
            for batch in growing_batches(len(counts), mean_bytes):
                self._runtime.copy_batch(destinations[batch], sources[batch], sizes_bytes[batch], self.stream)
            return self._event()

    def copy_by_kernel(self, source: MappedPool, remote: Blocks, local: Blocks) -> torch.cuda.Event:
        spacing = RowSpacing.one_row(self._block_bytes)
        return self._copy_rows(source, remote * self._block_bytes, local * self._block_bytes, spacing)

    def copy_slices(self, source: MappedPool, remote: Blocks, local: Blocks, slices: BlockSlices) -> torch.cuda.Event:
        """Posts the copy of rows of blocks. The caller has checked that the rows lie within their blocks."""
        shape = slices.shape
        spacing = RowSpacing(
            outer=shape.outer,
            inner=shape.inner,
            row_bytes=shape.row_bytes,
            source_outer_stride=shape.remote_outer_stride,
            source_inner_stride=shape.remote_inner_stride,
            out_outer_stride=shape.local_outer_stride,
            out_inner_stride=shape.local_inner_stride,
        )
        remote_offsets = remote * source.block_bytes + slices.remote_offsets
        local_offsets = local * self._block_bytes + slices.local_offsets
        return self._copy_rows(source, remote_offsets, local_offsets, spacing)

    def copy_span(self, source: int, destination: torch.Tensor) -> torch.cuda.Event:
        """Posts the copy of one span into a tensor of bytes."""
        with self._current_device():
            self._runtime.copy(destination.data_ptr(), source, destination.numel(), self.stream)
            return self._event()

    def _copy_rows(
        self, source: MappedPool, remote_offsets: Blocks, local_offsets: Blocks, spacing: RowSpacing
    ) -> torch.cuda.Event:
        # A power of two divides all numbers if it divides all their bits together.
        bits = int(np.bitwise_or.reduce(remote_offsets)) | int(np.bitwise_or.reduce(local_offsets))
        alignment = spacing.alignment(source.address, self._pool.data_ptr(), bits)
        table = self._tables.take(len(remote_offsets))
        # A kernel is launched on the current device.
        with self._current_device():
            offsets = table.upload(remote_offsets, local_offsets)
            self._rows.copy(source.address, self._pool, offsets, spacing, alignment)
            table.used_until = self._event()
        return table.used_until

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def _current_device(self) -> AbstractContextManager[object]:
        """That of an engine's thread is our device already."""
        is_current = torch.cuda.current_device() == self.device.index
        return nullcontext() if is_current else torch.cuda.device(self.device)

    def _warm_up(self) -> None:
        scratch = torch.zeros(2 * max(_WARM_ROW_BYTES), dtype=torch.uint8, device=self.device)
        with torch.cuda.device(self.device):
            table = torch.zeros(2, 1, dtype=torch.int64, device=self.device)
            torch.cuda.synchronize(self.device)  # what is zeroed on one stream is read on another
            for row_bytes in _WARM_ROW_BYTES:
                out, spacing = scratch[max(_WARM_ROW_BYTES) :], RowSpacing.one_row(row_bytes)
                self._rows.copy(scratch.data_ptr(), out, table, spacing, 16)
            torch.cuda.synchronize(self.device)


def growing_batches(num_spans: int, span_bytes: int) -> Iterator[slice]:
    """In order, and all of them."""
    first, size = 0, max(1, _FIRST_BATCH_BYTES // span_bytes)
    while first < num_spans:
        yield slice(first, min(first + size, num_spans))
        first, size = first + size, size * _BATCH_GROWTH
