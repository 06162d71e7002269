"""Moves values to and from a place by several threads at once, and says how fast."""

from __future__ import annotations

import mmap
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from blake3 import blake3
from tier_places import Place

from kvrelay_transfer.tiers.part_format import HEADER_BYTES, PartHeader, seal_part
from kvrelay_transfer.tiers.part_key import KeyMaker, PartKey

MIB = 1 << 20


def value_keys(count: int) -> list[PartKey]:
    maker = KeyMaker((b"bench",))
    return [maker.key(number.to_bytes(8, "little"), 0) for number in range(count)]


def page_aligned(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes))


def sealed_value(size_bytes: int) -> memoryview:
    """Header and body together have this size, so that files of it are whole blocks. Stores do not mind that it has
    the key of another one."""
    value = page_aligned(size_bytes)
    body_bytes = size_bytes - HEADER_BYTES
    value[HEADER_BYTES:] = blake3(b"bench").digest(body_bytes)
    seal_part(PartHeader(value_keys(1)[0], 1, body_bytes, body_bytes), value)
    return value


class Movers:
    """As many threads, each with room for a value of its own. To be used in a `with` block."""

    def __init__(self, place: Place, value: memoryview, connections: int) -> None:
        self._place = place
        self._value = value
        self._rooms = [page_aligned(len(value)) for _ in range(connections)]
        self._threads = ThreadPoolExecutor(connections)
        self._start = threading.Barrier(connections)
        for room in self._rooms:
            room[:] = value  # all pages are there

    def put_s(self, keys: Sequence[PartKey]) -> float:
        """Seconds until all are there."""

        def put(key: PartKey, room: memoryview) -> None:
            assert self._place.put(key, self._value)

        return self._run_s(put, keys)

    def get_s(self, keys: Sequence[PartKey]) -> float:
        """Seconds until all have come."""

        def get(key: PartKey, room: memoryview) -> None:
            assert self._place.get(key, room) == len(self._value)

        return self._run_s(get, keys)

    def check(self, key: PartKey) -> None:
        """That what is got is what was put."""
        self._rooms[0][:] = bytes(len(self._value))
        self.get_s([key])
        assert any(room == self._value for room in self._rooms)

    def _run_s(self, move: Callable[[PartKey, memoryview], None], keys: Sequence[PartKey]) -> float:
        count = len(self._rooms)

        def run(index: int) -> tuple[float, float]:
            self._start.wait()
            started_s = time.perf_counter()
            for key in keys[index::count]:
                move(key, self._rooms[index])
            return started_s, time.perf_counter()

        spans = list(self._threads.map(run, range(count)))
        return max(ended_s for _, ended_s in spans) - min(started_s for started_s, _ in spans)

    def __enter__(self) -> Movers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()


def median_gb_per_s(moved_bytes: int, seconds: Sequence[float]) -> float:
    return moved_bytes / statistics.median(seconds) / 1e9
