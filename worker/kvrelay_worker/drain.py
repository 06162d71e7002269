"""Waits until a draining worker has nothing left to do. It looks at every beat of the engine, so it needs no timer
of its own but the deadline's."""

from __future__ import annotations

import asyncio

from kvrelay_core.errors import WorkerLostError
from kvrelay_engine.messages import Beat
from kvrelay_engine.messages import Drain as StopAdmitting
from kvrelay_worker.worker import Worker


class Drain:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._idle = asyncio.Event()
        self._over = asyncio.Event()
        worker.engine.on(Beat, self._on_beat)
        worker.engine.on_loss(lambda _: self._idle.set())

    async def run(self) -> int:
        """Tells the engine, then waits for idleness or the deadline. Returns the number of requests left."""
        worker = self._worker
        assert worker.drain_deadline_s is not None, "request_drain() comes first"
        try:
            worker.engine.send(StopAdmitting())
            async with asyncio.timeout(max(0.0, worker.drain_deadline_s - worker.clock.now())):
                await self._idle.wait()
        except (TimeoutError, WorkerLostError):
            pass  # what is left is counted below
        finally:
            self._over.set()
        return worker.num_live_requests

    async def wait(self) -> int:
        """Until `run()`, called by whoever owns the process, is through. Returns the number of requests left."""
        await self._over.wait()
        return self._worker.num_live_requests

    def _on_beat(self, beat: Beat) -> None:
        # Those sent before the engine saw its last commands do not count.
        if beat.is_draining and self._worker.is_idle:
            self._idle.set()
