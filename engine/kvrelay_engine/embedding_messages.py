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


class EmbeddingChecked(Command, frozen=True):
    """The answer to EmbeddingCheck; `error`: the ticket is not the encoder's, or nobody could be asked."""

    ticket_id: str
    error: ErrorInfo | None = None


class EmbeddingCheck(Event, frozen=True):
    """All that the ticket names was read: is it the encoder's own? Its pins are given back in the same call."""

    ticket: EmbeddingTicket


class EmbeddingRelease(Event, frozen=True):
    """The ticket is of no use here any more: its pins can be given back. Not said of one that was
    checked and found good."""

    ticket: EmbeddingTicket
