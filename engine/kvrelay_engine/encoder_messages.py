"""What an encoder's service and its engine say to each other beyond what every worker's do: see `messages.py`."""

from __future__ import annotations

from kvrelay_core.media.video import MediaContent
from kvrelay_core.request import ErrorInfo
from kvrelay_engine.message_kinds import Command, Event
from kvrelay_transfer.ticket import EmbeddingTicket


class EncodeItem(Command, frozen=True):
    """Make the embedding of a media item, unless it is here. Answered by ItemEncoded, or ended by Abort."""

    id: int
    content_hash: bytes  # of `data`
    data: MediaContent  # as the client sent it


class ItemEncoded(Event, frozen=True):
    """Either of the two is set. The ticket's lease runs from now on."""

    id: int
    ticket: EmbeddingTicket | None = None
    was_cached: bool = False
    error: ErrorInfo | None = None


class Pulse(Event, frozen=True):
    """The loop computes, and will beat again: see `pulse.py`."""
