"""Signs of life while an engine's loop computes: a step of seconds is not taken for an engine that stands still.

A thread says so to the service twice a second, over a socket of its own, as long as the computation lasts, but not
beyond `max_compute_s`: what takes longer counts as hung. While nothing is computed it sleeps, and the loop's beats do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from kvrelay_core.clock import Clock

PULSE_S = 0.5
MAX_COMPUTE_S = 120.0


class PulseSocket(Protocol):
    def pulse(self) -> None:
        """Never blocks."""
        ...

    def close(self) -> None: ...


class PulseThread:
    def __init__(
        self,
        open_socket: Callable[[], PulseSocket],
        clock: Clock,
        *,
        pulse_s: float = PULSE_S,
        max_compute_s: float = MAX_COMPUTE_S,
    ) -> None:
        """`open_socket` is called in the thread, which alone uses what it gives."""
        self._open_socket = open_socket
        self._clock = clock
        self._pulse_s = pulse_s
        self._max_compute_s = max_compute_s
        self._changed = threading.Condition()
        self._since_s: float | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The loop does not beat inside of it."""
        self._set_since(self._clock.now())
        try:
            yield
        finally:
            self._set_since(None)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _set_since(self, since_s: float | None) -> None:
        with self._changed:
            self._since_s = since_s
            self._changed.notify_all()

    def _run(self) -> None:
        socket = self._open_socket()
        try:
            while self._wait_due():
                socket.pulse()
        finally:
            socket.close()

    def _wait_due(self) -> bool:
        """Returns when a pulse is due; False: closed."""
        with self._changed:
            while not self._is_closed:
                since_s = self._since_s
                ends = lambda since_s=since_s: self._is_closed or self._since_s != since_s  # noqa: E731
                if since_s is None or self._clock.now() - since_s >= self._max_compute_s:
                    self._changed.wait_for(ends)
                elif not self._changed.wait_for(ends, self._pulse_s):
                    return True
        return False
