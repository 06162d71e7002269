"""What prefill's service and its engine say to each other of embeddings: see `messages.py`."""

from __future__ import annotations

from kvrelay_core.request import ErrorInfo
from kvrelay_engine.message_kinds import Command, Event
from kvrelay_transfer.ticket import EmbeddingTicket


class EmbeddingSourceFailed(Command, frozen=True):
    """The service cannot connect the encoder that issued tickets of this request."""

    id: int
    source_address: str
    error: ErrorInfo


class EmbeddingRelease(Event, frozen=True):
    """The ticket is of no use here any more: its pins can be given back. Said once for each ticket of a request."""

    ticket: EmbeddingTicket
