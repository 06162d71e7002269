"""What may make parts smaller on their way to a tier. Host memory keeps them raw."""

from __future__ import annotations

from typing import Protocol


class Codec(Protocol):
    """Thread-safe. `number`, from 1 on, is what headers call it."""

    number: int

    def encode(self, raw: memoryview, into: memoryview) -> int | None:
        """The length of what is in `into`, which is as long as `raw`. None: it is not worth it, keep it raw."""

    def decode(self, body: memoryview, into: memoryview) -> bool:
        """Fills `into`, which is as long as the raw part was. False: `body` is not what `encode` makes."""
