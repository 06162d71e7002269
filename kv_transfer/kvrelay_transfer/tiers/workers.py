"""Threads that take jobs from one bounded queue. Nobody waits for room in it: what does not fit is refused.

They are daemons: a job may sit in a system call that nothing ends (a disk of a network that is gone), and a process
that is told to end is not to wait for it. `close` joins those that do end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """`run` does it; `give_up` is called instead, or after it raised, when nothing comes of it. Neither blocks for
    long."""

    run: Callable[[], None]
    give_up: Callable[[], None]


class Workers:
    """Thread-safe. An exception of a job is logged and counted, and costs that job only."""

    def __init__(self, name: str, num_threads: int, max_queued: int, on_bug: Callable[[], None]) -> None:
        """Threads are named `name` and a number. `on_bug` is called when a job raised."""
        self._on_bug = on_bug
        self._max_queued = max_queued
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._has_job = threading.Condition(self._lock)
        self._is_idle = threading.Condition(self._lock)
        self._has_room = threading.Condition(self._lock)
        self._is_closed = False
        self._running: dict[int, float] = {}  # thread number to since when
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"{name}{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def post(self, job: Job) -> bool:
        """False: the queue is full, or closed; the job is the caller's again."""
        return self._add(job, self._jobs.append)

    def post_first(self, job: Job) -> bool:
        """Before all that wait."""
        return self._add(job, self._jobs.appendleft)

    def are_stuck(self, limit_s: float) -> bool:
        """All threads have been at one job each for longer than that."""
        now_s = time.monotonic()
        with self._lock:
            return len(self._running) == len(self._threads) and all(
                now_s - since_s > limit_s for since_s in self._running.values()
            )

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether, within that time, no job waits or runs."""
        with self._lock:
            return self._is_idle.wait_for(lambda: not self._jobs and not self._running, timeout_s)

    def wait_room(self, timeout_s: float) -> bool:
        """Whether, within that time, one more job would fit."""
        with self._lock:
            self._has_room.wait_for(lambda: self._is_closed or len(self._jobs) < self._max_queued, max(0.0, timeout_s))
            return not self._is_closed and len(self._jobs) < self._max_queued

    @property
    def num_queued(self) -> int:
        return len(self._jobs)

    def stop(self) -> None:
        """Takes no more jobs and gives up those that wait. Those that run go on."""
        with self._lock:
            self._is_closed = True
            dropped = list(self._jobs)
            self._jobs.clear()
            self._has_job.notify_all()
            self._is_idle.notify_all()
            self._has_room.notify_all()
        for job in dropped:
            self._guard(job.give_up)

    def join(self, timeout_s: float) -> bool:
        """After `stop`: whether all threads have ended within that time."""
        until_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        alive = [thread.name for thread in self._threads if thread.is_alive()]
        if alive:
            log.warning("threads of a tier hang in a call and are left behind: %s", ", ".join(alive))
        return not alive

    def _add(self, job: Job, add: Callable[[Job], None]) -> bool:
        with self._lock:
            if self._is_closed or len(self._jobs) >= self._max_queued:
                return False
            add(job)
            self._has_job.notify()
        return True

    def _work(self, number: int) -> None:
        while (job := self._take(number)) is not None:
            if not self._guard(job.run):
                self._guard(job.give_up)
            del job  # what it holds is not to stay until the next one
            with self._lock:
                del self._running[number]
                if not self._jobs and not self._running:
                    self._is_idle.notify_all()

    def _take(self, number: int) -> Job | None:
        with self._lock:
            self._has_job.wait_for(lambda: self._jobs or self._is_closed)
            if not self._jobs:
                return None
            self._running[number] = time.monotonic()
            self._has_room.notify()
            return self._jobs.popleft()

    def _guard(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception:
            log.exception("a job of a tier failed")
            self._on_bug()
            return False
        return True
