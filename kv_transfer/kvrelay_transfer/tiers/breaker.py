"""Whether it is worth asking a place that has failed: not for a while after several errors in a row, then once.

Knows no stores: whoever calls one asks `admit` before, and says afterwards how it went.
"""

from __future__ import annotations

import threading

from kvrelay_core.clock import Clock


class Breaker:
    """Thread-safe."""

    def __init__(self, clock: Clock, *, max_errors: int = 3, pause_s: float = 1.0, max_pause_s: float = 30.0) -> None:
        """Opens after `max_errors` in a row, for `pause_s`, which doubles with each attempt that fails."""
        self._clock = clock
        self._max_errors = max_errors
        self._first_pause_s = pause_s
        self._max_pause_s = max_pause_s
        self._lock = threading.Lock()
        self._num_errors = 0  # in a row
        self._pause_s = pause_s
        self._open_until_s: float | None = None
        self._is_trying = False
        self.num_openings = 0

    @property
    def is_open(self) -> bool:
        """A call would be refused now."""
        with self._lock:
            return self._refuses()

    def admit(self) -> bool:
        """Whether to call now. After the pause one caller may try, and the others wait for what comes of it."""
        with self._lock:
            if self._refuses():
                return False
            self._is_trying = self._open_until_s is not None
            return True

    def succeed(self) -> None:
        with self._lock:
            self._num_errors = 0
            self._pause_s = self._first_pause_s
            self._open_until_s = None
            self._is_trying = False

    def fail(self) -> None:
        with self._lock:
            self._num_errors += 1
            if self._is_trying:
                self._pause_s = min(2 * self._pause_s, self._max_pause_s)
            elif self._open_until_s is not None or self._num_errors < self._max_errors:
                return  # a call that began before it opened
            self._is_trying = False
            self._open_until_s = self._clock.now() + self._pause_s
            self.num_openings += 1

    def _refuses(self) -> bool:
        return self._open_until_s is not None and (self._is_trying or self._clock.now() < self._open_until_s)
