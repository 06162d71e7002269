"""A read over one link, counted: the connector's transfer, and how it ended, once, which its link is told as well.

Knows no tickets and no peers.
"""

from __future__ import annotations

from typing import Protocol

from kvrelay_core.clock import Clock
from kvrelay_core.errors import KvRelayError, TransferError
from kvrelay_engine.link_health import is_fault_of_the_way
from kvrelay_engine.transfer_stats import TransferStats
from kvrelay_transfer.connectors.base import BlockRead, Transfer, TransferState
from kvrelay_transfer.connectors.block_runs import count_runs


class Way(Protocol):
    """What a read goes by."""

    @property
    def is_closed(self) -> bool:
        """By us, because the peer is gone; not lost by the connector itself."""

    def note_read(self, error: KvRelayError | None) -> None:
        """A read came, or failed through a fault of the way."""

    def note_end(self) -> None:
        """A read is over, whatever became of it."""


class LinkRead(Transfer):
    def __init__(
        self,
        inner: Transfer,
        read: BlockRead,
        way: Way,
        block_bytes: int,
        stats: tuple[TransferStats, ...],
        clock: Clock,
    ) -> None:
        """`block_bytes` of a whole block. Reads that were given up or closed with their link, and what the source
        refused, count neither way. A read that has failed and cannot be stopped counts when that is known."""
        self.poll_s = inner.poll_s
        self._inner = inner
        self._way = way
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
            self._way.note_end()
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
        if state is TransferState.DONE:
            size_bytes, spans, seconds = self._size_bytes(), self._num_spans(), self._clock.now() - self._posted_at_s
            for counts in self._stats:
                counts.succeed(size_bytes, spans, seconds)
            self._way.note_read(None)
        elif self._is_fault(state):
            for counts in self._stats:
                counts.fail()
            self._way.note_read(self.error or TransferError(f"the read ended as {state.value}"))

    def _is_fault(self, state: TransferState) -> bool:
        if state is TransferState.TORN_DOWN:
            return not self._way.is_closed  # the connector lost it
        return is_fault_of_the_way(self.error)

    def _size_bytes(self) -> int:
        read = self._read
        each = self._block_bytes if read.slices is None else read.slices.shape.size_bytes
        return len(read.local) * each

    def _num_spans(self) -> int:
        read = self._read
        if read.slices is None:
            return count_runs(read.remote, read.local)
        return len(read.local) * read.slices.shape.outer * read.slices.shape.inner
