"""What a tier has done, in numbers. Counted by its threads, read by whoever makes metrics of them."""

from __future__ import annotations

import threading
from collections import Counter
from enum import Enum

from msgspec import Struct

from kvrelay_transfer.tiers.part_store import StoreUsage


class Count(Enum):
    HITS = "hits"  # parts that came back whole
    MISSES = "misses"  # parts that were looked for and are not there; those behind them are not looked for
    BAD = "bad"  # parts that are not what was asked for: damaged, truncated, foreign
    READ_BYTES = "read_bytes"
    WRITTEN = "written"  # parts
    WRITTEN_BYTES = "written_bytes"
    ERRORS = "errors"  # calls that failed
    DROPPED = "dropped"  # stores that did not happen: no room, a full queue, an open breaker
    STALE = "stale"  # stores whose block was given away meanwhile (PROTOCOL A7)


class Counts:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: Counter[Count] = Counter()

    def add(self, count: Count, number: int = 1) -> None:
        with self._lock:
            self._numbers[count] += number

    def __getitem__(self, count: Count) -> int:
        return self._numbers[count]

    def by_name(self) -> dict[str, int]:
        """All of them, by their values."""
        with self._lock:
            return {count.value: self._numbers[count] for count in Count}


class TierStats(Struct, frozen=True):
    name: str
    counts: dict[str, int]  # by the values of Count
    usage: StoreUsage  # as of the last refresh
    num_queued: int = 0  # reads and writes
    is_open: bool = False  # the breaker: the tier is not asked
    num_openings: int = 0
    gb_per_s: float = 0.0  # of reads; 0 while nothing has been measured


class ChainStats(Struct, frozen=True):
    """Host memory first."""

    tiers: tuple[TierStats, ...]
