"""When an engine works and when it sleeps: commands, a step, a beat, and so on until Shutdown.

While there is something to compute the loop never waits; reads under way are polled as often as suits their connector,
every half millisecond or more often; an idle engine wakes twice a second to beat, and checks its counts once after it
has worked. While it drains it beats at once and often. What there is to poll for, each kind of engine says itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from kvrelay_core.clock import Clock
from kvrelay_core.errors import WorkerLostError
from kvrelay_engine.engine import Engine
from kvrelay_engine.messages import Drain, EngineCommand, Shutdown
from kvrelay_engine.service_link import ServiceLink

BEAT_S = 0.5
DRAINING_BEAT_S = 0.05  # the service ends as soon as a beat says that nothing is left
ROOM_POLL_S = 0.002  # requests wait for blocks or pins that others hold
LEASE_POLL_S = 0.05  # leases, deadlines and time budgets
CONNECT_TIMEOUT_S = 10.0


class LoopedEngine(Protocol):
    """What the loop knows of an engine."""

    is_draining: bool

    @property
    def is_idle(self) -> bool: ...

    def handle(self, command: EngineCommand) -> None: ...

    def step(self) -> bool:
        """True if it computed something."""

    def beat(self) -> None: ...


E = TypeVar("E", bound=LoopedEngine)


class Loop(ABC, Generic[E]):
    def __init__(self, engine: E, link: ServiceLink, clock: Clock) -> None:
        self._engine = engine
        self._link = link
        self._clock = clock
        self._started_s = clock.now()
        self._next_beat_s = 0.0  # at once
        self._has_computed = False
        self._is_unchecked = False  # something was computed since the last check

    @abstractmethod
    def poll_s(self) -> float | None:
        """When to look again, where nothing was computed and no command comes; None: at the next beat."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Asserts that the counts of the idle engine are right."""

    def run(self) -> None:
        """Returns after Shutdown. Raises WorkerLostError when the service is gone."""
        while True:
            for command in self._link.receive(self._wait_s()):
                self._engine.handle(command)
                if isinstance(command, Shutdown):
                    return
                if isinstance(command, Drain):
                    self._next_beat_s = 0.0
            self._has_computed = self._engine.step()
            self._is_unchecked |= self._has_computed
            self._beat_when_due()

    def _wait_s(self) -> float:
        if self._has_computed:
            return 0.0
        until_beat_s = max(0.0, self._next_beat_s - self._clock.now())
        poll_s = self.poll_s()
        return until_beat_s if poll_s is None else min(poll_s, until_beat_s)

    def _beat_when_due(self) -> None:
        now_s = self._clock.now()
        if now_s < self._next_beat_s:
            return
        self._next_beat_s = now_s + (DRAINING_BEAT_S if self._engine.is_draining else BEAT_S)
        self._engine.beat()
        self._link.check_service()
        if self._is_unchecked and self._engine.is_idle:
            self._is_unchecked = False
            self.check_integrity()
        if not self._link.was_connected and now_s - self._started_s > CONNECT_TIMEOUT_S:
            raise WorkerLostError(f"the service did not open its command pipe within {CONNECT_TIMEOUT_S:g} s")


class EngineLoop(Loop[Engine]):
    """Of a prefill or decode engine."""

    def poll_s(self) -> float | None:
        if self._engine.remote_kv.is_busy:
            return self._engine.remote_kv.poll_s
        if self._engine.scheduler.has_work:
            return ROOM_POLL_S
        return LEASE_POLL_S if self._engine.has_requests or not self._engine.is_idle else None

    def check_integrity(self) -> None:
        self._engine.load.check_integrity()
