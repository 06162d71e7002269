"""When the encoder's engine works and when it sleeps."""

from __future__ import annotations

from kvrelay_engine.encoder.engine import EncoderEngine
from kvrelay_engine.loop import LEASE_POLL_S, ROOM_POLL_S, Loop

DECODED_POLL_S = 0.001


class EncoderLoop(Loop[EncoderEngine]):
    def poll_s(self) -> float | None:
        if self._engine.has_jobs:
            return DECODED_POLL_S if self._engine.is_decoding else ROOM_POLL_S
        return None if self._engine.is_idle else LEASE_POLL_S

    def check_integrity(self) -> None:
        self._engine.check_integrity()
