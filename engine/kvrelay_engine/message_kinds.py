"""What every message between a service and its engine is: see `messages`."""

from __future__ import annotations

from msgspec import Struct


class Command(Struct, frozen=True, tag=True):
    """To the engine."""


class Event(Struct, frozen=True, tag=True):
    """From the engine."""
