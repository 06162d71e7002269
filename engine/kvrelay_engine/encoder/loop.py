"""When the encoder's engine works and when it sleeps: commands, a step, a beat, and so on until Shutdown."""

from __future__ import annotations

from kvrelay_core.clock import Clock
from kvrelay_core.errors import WorkerLostError
from kvrelay_engine.encoder.engine import EncoderEngine
from kvrelay_engine.loop import BEAT_S, CONNECT_TIMEOUT_S, DRAINING_BEAT_S, LEASE_POLL_S, ROOM_POLL_S
from kvrelay_engine.messages import Drain, Shutdown
from kvrelay_engine.service_link import ServiceLink


class EncoderLoop:
    def __init__(self, engine: EncoderEngine, link: ServiceLink, clock: Clock) -> None:
        self._engine = engine
        self._link = link
        self._clock = clock
        self._started_s = clock.now()
        self._next_beat_s = 0.0  # at once
        self._has_encoded = False
        self._is_unchecked = False  # something was encoded since the last check

    def run(self) -> None:
        """Returns after Shutdown. Raises WorkerLostError when the service is gone."""
        while True:
            for command in self._link.receive(self._wait_s()):
                self._engine.handle(command)
                if isinstance(command, Shutdown):
                    return
                if isinstance(command, Drain):
                    self._next_beat_s = 0.0
            self._has_encoded = self._engine.step()
            self._is_unchecked |= self._has_encoded
            self._beat_when_due()

    def _wait_s(self) -> float:
        if self._has_encoded:
            return 0.0
        if self._engine.has_jobs:
            return ROOM_POLL_S
        until_beat_s = max(0.0, self._next_beat_s - self._clock.now())
        return until_beat_s if self._engine.is_idle else min(LEASE_POLL_S, until_beat_s)

    def _beat_when_due(self) -> None:
        now_s = self._clock.now()
        if now_s < self._next_beat_s:
            return
        self._next_beat_s = now_s + (DRAINING_BEAT_S if self._engine.is_draining else BEAT_S)
        self._engine.beat()
        self._link.check_service()
        if self._is_unchecked and self._engine.is_idle:
            self._is_unchecked = False
            self._engine.check_integrity()
        if not self._link.was_connected and now_s - self._started_s > CONNECT_TIMEOUT_S:
            raise WorkerLostError(f"the service did not open its command pipe within {CONNECT_TIMEOUT_S:g} s")
