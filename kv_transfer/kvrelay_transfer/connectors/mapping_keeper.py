"""One thread that sees peers die and unmaps their memory when no copy uses it any more.

A source hands out the read end of a pipe that only it can write to: when it ends, however it ends, the kernel closes
the pipe and this thread wakes up. Unmapping waits for copies that were posted and then for the device, which must not
hold up the engine's steps. Knows no CUDA: what to do is a `Mapping`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from typing import Protocol

log = logging.getLogger(__name__)

# Between two looks whether the copies of a mapping that is to go have ended; nobody waits for it but memory.
_RETIRE_POLL_MS = 1
# How long `close` waits for copies; the driver frees what a process leaves mapped.
_CLOSE_TIMEOUT_S = 5.0


class Mapping(Protocol):
    """All methods are called on the keeper's thread."""

    @property
    def life_fd(self) -> int:
        """Read end of the owner's pipe; the keeper closes it when the mapping has gone."""
        ...

    def lose(self) -> None:
        """The owner is gone: post no more copies."""
        ...

    def unmap(self) -> bool:
        """False, having unmapped nothing, while copies are under way."""
        ...


class MappingKeeper:
    def __init__(self, name: str) -> None:
        self._name = name
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()  # of the two lists, which `watch` and `retire` fill
        self._arrived: list[Mapping] = []
        self._leaving: list[Mapping] = []
        self._watched: dict[int, Mapping] = {}
        self._retired: list[Mapping] = []
        self._close_at_s: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def watch(self, mapping: Mapping) -> None:
        with self._lock:
            self._arrived.append(mapping)
        os.eventfd_write(self._wake, 1)

    def retire(self, mapping: Mapping) -> None:
        """Unmaps it as soon as no copy uses it. No more copies may be posted."""
        with self._lock:
            self._leaving.append(mapping)
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Returns when all retired mappings are gone, or after some seconds."""
        self._close_at_s = time.monotonic() + _CLOSE_TIMEOUT_S
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        while self._is_needed():
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            for life_fd in self._watched:
                poller.register(life_fd, 0)  # HUP is reported unasked
            for fd, _ in poller.poll(_RETIRE_POLL_MS if self._retired else None):
                if fd == self._wake:
                    self._take_in()
                elif fd in self._watched:  # else it was retired in this very round
                    self._lose(self._watched.pop(fd))
            self._retired = [mapping for mapping in self._retired if not self._unmap(mapping)]

    def _is_needed(self) -> bool:
        if self._close_at_s is None:
            return True
        self._take_in()
        if self._retired and time.monotonic() >= self._close_at_s:
            log.error("%s: %d mappings are still in use at the end", self._name, len(self._retired))
            return False
        return bool(self._retired)

    def _take_in(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with self._lock:
            arrived, self._arrived = self._arrived, []
            leaving, self._leaving = self._leaving, []
        self._watched.update((mapping.life_fd, mapping) for mapping in arrived)
        for mapping in leaving:
            if self._watched.get(mapping.life_fd) is mapping:  # else its owner died before: the number may be another's
                del self._watched[mapping.life_fd]
                self._retired.append(mapping)

    def _lose(self, mapping: Mapping) -> None:
        mapping.lose()
        self._retired.append(mapping)

    def _unmap(self, mapping: Mapping) -> bool:
        life_fd = mapping.life_fd
        if not mapping.unmap():
            return False
        os.close(life_fd)
        return True
