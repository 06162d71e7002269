"""Ownership of asyncio tasks: every task has an owner that counts it, reports its crash and can end it.

Knows nothing of requests or streams.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

log = logging.getLogger(__name__)


class TaskOwner:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_crashed = 0

    def __len__(self) -> int:
        """Tasks that are still alive."""
        return len(self._tasks)

    def spawn(self, coroutine: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.num_crashed += 1
            log.error("task %s crashed", task.get_name(), exc_info=error)

    async def settle(self, timeout_s: float) -> None:
        """Waits for the tasks of now to end by themselves, but no longer than this."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    async def close(self) -> None:
        """Cancels every task and waits until all of them have ended. The calling task is spared."""
        current = asyncio.current_task()
        while tasks := [task for task in self._tasks if task is not current]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            # Their done callbacks, which take them off the set, run in the next iteration of the loop.
            await asyncio.sleep(0)


class Gauge:
    """A count of what is open, such as request streams."""

    def __init__(self) -> None:
        self.value = 0

    def enter(self) -> None:
        self.value += 1

    def leave(self) -> None:
        assert self.value > 0, "left more often than entered"
        self.value -= 1
