"""What the encoder's engine needs of whoever decodes media items for it."""

from __future__ import annotations

from typing import Generic, Protocol

from kvrelay_core.media.video import MediaContent
from kvrelay_engine.encoder.tower import I


class Decoding(Generic[I]):
    """One item on its way. Its result or its error is there once it is among the finished ones."""

    __slots__ = ("data", "error", "held_bytes", "is_running", "is_unwanted", "result")

    def __init__(self, data: MediaContent) -> None:
        self.data = data
        self.result: I | None = None
        self.error: Exception | None = None
        self.held_bytes = 0  # of the budget
        self.is_running = False
        self.is_unwanted = False


class Decoder(Protocol[I]):
    @property
    def is_idle(self) -> bool:
        """Nothing waits, is decoded, or is decoded and held."""
        ...

    def submit(self, data: MediaContent) -> Decoding[I]: ...

    def take_finished(self) -> list[Decoding[I]]:
        """Those that ended since the last call and that somebody wants."""
        ...

    def end(self, decoding: Decoding[I]) -> None:
        """Nobody needs the item any more, in whatever state it is."""
        ...

    def close(self) -> None:
        """Nothing is decoded any more when it returns."""
        ...
