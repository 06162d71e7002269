"""Events and actions of an itinerary about the embeddings of a request's images. Plain data.

Media items are named by their content hashes, encoders by keys that mean nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay.v1.common_pb2 import EmbeddingTicket
from kvrelay_core.errors import KvRelayError
from kvrelay_router.itinerary_messages import LegAction, LegEvent


@dataclass(frozen=True, slots=True)
class Encode(LegAction):
    """Have these items encoded, wherever; each is answered by Encoded or EncodeFailed, unless it is cancelled."""

    items: tuple[bytes, ...]
    avoided: frozenset[str]  # encoders that failed or lost them: rather others


@dataclass(frozen=True, slots=True)
class CancelEncode(LegAction):
    """Nobody waits for what is still under way."""


@dataclass(frozen=True, slots=True)
class ReleaseEmbeddings(LegAction):
    """No prefill worker reads these, or goes on reading them: give their pins back."""

    tickets: tuple[tuple[str, EmbeddingTicket], ...]  # each with the encoder that issued it


@dataclass(frozen=True, slots=True)
class Encoded(LegEvent):
    encoder: str
    tickets: dict[bytes, EmbeddingTicket]  # never looked into here


@dataclass(frozen=True, slots=True)
class EncodeFailed(LegEvent):
    """A WorkerLostError says that the encoder died with the items, or may have."""

    encoder: str  # empty: none took them in time
    items: tuple[bytes, ...]
    error: KvRelayError
