"""A read over one link, counted: the connector's transfer, and how it ended. Knows no tickets and no peers."""

from __future__ import annotations

from kvrelay_core.clock import Clock
from kvrelay_engine.link_health import is_fault_of_the_way
from kvrelay_engine.transfer_stats import TransferStats
from kvrelay_transfer.connectors.base import BlockRead, Transfer, TransferState
from kvrelay_transfer.connectors.copy_thread import merge_runs


class LinkRead(Transfer):
    def __init__(
        self, inner: Transfer, read: BlockRead, block_bytes: int, stats: tuple[TransferStats, ...], clock: Clock
    ) -> None:
        """`block_bytes` of a whole block. Reads that were given up or torn down, and what the source
        refused, count neither way."""
        self._inner = inner
        self._read = read
        self._block_bytes = block_bytes
        self._stats = stats
        self._clock = clock
        self._posted_at_s = clock.now()
        self._is_counted = False
        self._is_over = False
        for counts in stats:
            counts.begin()

    def poll(self) -> TransferState:
        state = self._inner.poll()
        self.words, self.error = self._inner.words, self._inner.error
        if state.is_terminal and not self._is_over:
            self._is_over = True
            for counts in self._stats:
                counts.end()
        if (state.is_terminal or self.error is not None) and not self._is_counted:
            self._is_counted = True
            self._count(state)
        return state

    def abort(self) -> None:
        self._is_counted = True
        self._inner.abort()

    def _count(self, state: TransferState) -> None:
        if state is not TransferState.DONE:
            is_failure = state is not TransferState.TORN_DOWN and is_fault_of_the_way(self.error)
            for counts in self._stats if is_failure else ():
                counts.fail()
            return
        size_bytes, spans, seconds = self._size_bytes(), self._num_spans(), self._clock.now() - self._posted_at_s
        for counts in self._stats:
            counts.succeed(size_bytes, spans, seconds)

    def _size_bytes(self) -> int:
        read = self._read
        each = self._block_bytes if read.slices is None else read.slices.shape.size_bytes
        return len(read.local_blocks) * each

    def _num_spans(self) -> int:
        read = self._read
        if read.slices is None:
            return len(merge_runs(read.remote_blocks, read.local_blocks))
        return len(read.local_blocks) * read.slices.shape.outer * read.slices.shape.inner
