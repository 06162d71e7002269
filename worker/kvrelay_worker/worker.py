"""What the servicers of one worker process share: the engine, task owners, counters, and the drain.

Knows nothing of what the services do.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from kvrelay_core.clock import Clock
from kvrelay_core.errors import DrainingError, UnavailableError
from kvrelay_worker.config import WorkerConfig
from kvrelay_worker.engine_link import EngineLink
from kvrelay_worker.staging import Staging
from kvrelay_worker.tasks import Gauge, TaskOwner


class Worker:
    def __init__(self, config: WorkerConfig, engine: EngineLink, clock: Clock) -> None:
        self.config = config
        self.engine = engine
        self.clock = clock
        self.staging: Staging | None = None  # mapped once the engine has started
        self.address = ""  # where peers reach us; set once the port is bound
        self.tasks = TaskOwner()  # as long-lived as the process or a router's session
        self.request_tasks = TaskOwner()  # on behalf of one request: none when idle
        self.streams = Gauge()  # on behalf of one request: none when idle; sessions are not counted
        self.request_ids = itertools.count(1)
        self.drain_deadline_s: float | None = None  # on the clock; None: not draining
        self._drain_requested = asyncio.Event()
        self._live_counts: list[Callable[[], int]] = []

    @property
    def is_draining(self) -> bool:
        return self.drain_deadline_s is not None

    def check_accepting(self) -> None:
        """Raises UnavailableError before the engine is ready or once it is lost, DrainingError while draining."""
        _ = self.engine.started
        if self.is_draining:
            raise DrainingError(f"worker {self.config.worker_id} is draining; ask another one")

    @property
    def slots(self) -> Staging:
        """The staging ring. Raises UnavailableError before the engine is ready."""
        if self.staging is None:
            raise UnavailableError("the engine is still loading its model; try again soon")
        return self.staging

    def count_live(self, count: Callable[[], int]) -> None:
        """Registers a count of requests that a drain has to wait for."""
        self._live_counts.append(count)

    @property
    def num_live_requests(self) -> int:
        return sum(count() for count in self._live_counts)

    @property
    def is_idle(self) -> bool:
        """Nothing is in progress here or, as of its latest beat, in the engine: no lease, no transfer."""
        load = self.engine.load
        held = (
            load.requests_waiting + load.requests_waiting_remote_kv + load.requests_running
            + load.leases + load.transfers
        )  # fmt: skip
        return self.num_live_requests == 0 and held == 0

    def request_drain(self, deadline_s: float) -> None:
        """Takes nothing new from now on. Asked again, the first deadline holds."""
        if self.drain_deadline_s is None:
            self.drain_deadline_s = self.clock.now() + deadline_s
            self._drain_requested.set()

    async def wait_drain_requested(self) -> None:
        await self._drain_requested.wait()

    async def close(self) -> None:
        await self.request_tasks.close()
        await self.tasks.close()
