"""How fast a tier gives parts, measured: the base of every estimate of what a load takes.

Old measurements lose their weight: a tier that was slow is not asked, so it would stay slow for ever.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvrelay_core.clock import Clock

_WEIGHT_OF_NEWEST = 0.2
_HALF_LIFE_S = 30.0


class Speed:
    """Moving averages over the tier's calls, of however many threads. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_begun = 0
        self._under_way: dict[int, float] = {}  # number to since when
        self._arrived_s = -math.inf  # when the last part came
        self._seconds_per_byte = _Average()
        self._latency_s = _Average()

    @contextmanager
    def measure(self, size_bytes: int) -> Iterator[Callable[[], None]]:
        """While a part of about that size is under way; to be called when it has come. Of several at once each took
        the time since the one before it came, which makes it the speed of all together."""
        with self._lock:
            self._num_begun += 1
            number = self._num_begun
            self._under_way[number] = self._clock.now()
        try:
            yield lambda: self._arrive(size_bytes)
        finally:
            with self._lock:
                del self._under_way[number]

    def _arrive(self, size_bytes: int) -> None:
        with self._lock:
            now_s = self._clock.now()
            since_s = max(self._arrived_s, min(self._under_way.values()))
            self._seconds_per_byte.record((now_s - since_s) / size_bytes, now_s)
            self._arrived_s = now_s

    def record_latency(self, seconds: float) -> None:
        """Of a call that moves next to nothing."""
        with self._lock:
            self._latency_s.record(seconds, self._clock.now())

    def seconds_for(self, size_bytes: int) -> float:
        """0 while nothing has been measured."""
        with self._lock:
            now_s = self._clock.now()
            return size_bytes * self._seconds_per_byte.at(now_s) + self._latency_s.at(now_s)

    @property
    def gb_per_s(self) -> float:
        """0 while nothing has been measured."""
        seconds_per_byte = self._seconds_per_byte.mean
        return 1e-9 / seconds_per_byte if seconds_per_byte else 0.0


class _Average:
    def __init__(self) -> None:
        self.mean: float | None = None
        self._measured_s = 0.0

    def record(self, newest: float, now_s: float) -> None:
        self.mean = newest if self.mean is None else self.mean + _WEIGHT_OF_NEWEST * (newest - self.mean)
        self._measured_s = now_s

    def at(self, now_s: float) -> float:
        """What it is worth by then."""
        return (self.mean or 0.0) * math.exp2((self._measured_s - now_s) / _HALF_LIFE_S)
