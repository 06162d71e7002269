"""Counts of reads, of one link or of one connector over all links. Times are those that the engine's loop saw.

Knows no connectors and no blocks.
"""

from __future__ import annotations

from kvrelay_core.clock import Clock
from kvrelay_engine.load_messages import ReadCounts


class TransferStats:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._under_way = 0
        self._since_s = 0.0  # with a read under way: when that began
        self._reading_s = 0.0
        self._latencies_s = 0.0
        self._reads = 0
        self._size_bytes = 0
        self._spans = 0
        self._failed_reads = 0
        self.stale_reads = 0
        self.fallbacks = 0

    def begin(self) -> None:
        if self._under_way == 0:
            self._since_s = self._clock.now()
        self._under_way += 1

    def end(self) -> None:
        """Whatever became of the read. Once for each `begin`."""
        self._under_way -= 1
        if self._under_way == 0:
            self._reading_s += self._clock.now() - self._since_s

    def succeed(self, size_bytes: int, spans: int, seconds: float) -> None:
        self._reads += 1
        self._size_bytes += size_bytes
        self._spans += spans
        self._latencies_s += seconds

    def fail(self) -> None:
        self._failed_reads += 1

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes a second, over the time with a read under way; 0.0 before there was one."""
        return self._size_bytes / self._reading_s / 1e9 if self._reading_s else 0.0

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def counts(self) -> ReadCounts:
        return ReadCounts(
            reads=self._reads, size_bytes=self._size_bytes, spans=self._spans, reading_s=self._reading_s,
            mean_read_s=self._latencies_s / max(1, self._reads), failed_reads=self._failed_reads,
            stale_reads=self.stale_reads, fallbacks=self.fallbacks,
        )  # fmt: skip
