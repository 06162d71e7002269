"""From images to tickets for their embeddings, before an attempt's prefill is opened. Pure: events in, actions out.

Each attempt that has a prefill worker gets tickets of its own: a ticket is good for one reader. What an encoder did
not manage is asked of another one; an image that encoders die of is given up (PROTOCOL C5). Knows nothing of the rest
of the itinerary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvrelay.v1.common_pb2 import EmbeddingTicket
from kvrelay_core.errors import EmbeddingLostError, KvRelayError, UnavailableError, WorkerLostError
from kvrelay_core.request import MediaReference
from kvrelay_router.encode_messages import CancelEncode, Encode, Encoded, EncodeFailed, ReleaseEmbeddings
from kvrelay_router.itinerary_messages import LegAction
from kvrelay_router.leg import Leg
from kvrelay_router.worker_errors import is_worth_another_place

MAX_ENCODER_DEATHS = 2  # of a request: its image may be what they died of
MAX_FAILURES = 3  # of an attempt
FREE_LOSSES = 2  # embeddings lost on their way to prefill, before they count as re-placements


class EncodeStage:
    def __init__(self, media: Sequence[MediaReference], do: Callable[[LegAction], None]) -> None:
        """`do` takes the actions."""
        self._items = tuple(dict.fromkeys(item.content_hash for item in media))
        self._media_end = max((item.offset + item.num_tokens for item in media), default=0)
        self._do = do
        self._deaths = 0

    @property
    def has_items(self) -> bool:
        return bool(self._items)

    def needs_embeddings(self, num_known: int) -> bool:
        """Whether to compute the prompt behind its first `num_known` tokens."""
        return self._media_end > num_known

    def begin(self, leg: Leg) -> bool:
        """The leg is placed. Whether its prefill has to wait until it is not encoding any more."""
        leg.unencoded = set(self._items)
        if self._items:
            self._ask(leg, self._items)
        return leg.is_encoding

    def handle(self, leg: Leg, event: Encoded | EncodeFailed) -> KvRelayError | None:
        """The error that the request fails with, if it does."""
        if isinstance(event, EncodeFailed):
            return self._on_failed(leg, event)
        for item in leg.unencoded & event.tickets.keys():
            leg.embeddings[item] = event.tickets[item]
            leg.encoded_by[item] = event.encoder
        leg.unencoded -= event.tickets.keys()
        return None

    def tickets(self, leg: Leg) -> tuple[EmbeddingTicket, ...]:
        """In the order in which the prompt has the items, each once."""
        return tuple(leg.embeddings[item] for item in self._items)

    def end(self, leg: Leg) -> None:
        """The attempt has no prefill any more: it encodes nothing, and what its prefill did not live to release, or
        never got, is released. Twice does no harm; what is not released is pinned until its lease ends."""
        if leg.is_encoding:
            leg.unencoded = set()
            self._do(CancelEncode(leg.key, leg.attempt))
        if leg.embeddings:
            tickets = tuple((leg.encoded_by[item], ticket) for item, ticket in leg.embeddings.items())
            leg.embeddings = {}
            self._do(ReleaseEmbeddings(leg.key, leg.attempt, tickets))

    def counts_as_replacement(self, leg: Leg, error: KvRelayError) -> bool:
        """Of an error that prefill ended with. Whose embedding it lost is asked elsewhere next."""
        if not isinstance(error, EmbeddingLostError):
            return True
        item = _hash_of(error)
        leg.avoided_encoders.update(leg.encoded_by.values() if item is None else {leg.encoded_by.get(item, "")})
        leg.lost_embeddings += 1
        return leg.lost_embeddings > FREE_LOSSES

    def _ask(self, leg: Leg, items: tuple[bytes, ...]) -> None:
        self._do(Encode(leg.key, leg.attempt, items, frozenset(leg.avoided_encoders)))

    def _on_failed(self, leg: Leg, event: EncodeFailed) -> KvRelayError | None:
        missing = tuple(item for item in event.items if item in leg.unencoded)
        if not missing:
            return None
        if not event.encoder or not is_worth_another_place(event.error):
            return event.error
        leg.encode_failures += 1
        self._deaths += isinstance(event.error, WorkerLostError)
        if self._deaths >= MAX_ENCODER_DEATHS:
            return UnavailableError(
                f"{self._deaths} encoders were lost while they had this request's images; it is not tried again "
                f"({event.error.message})"
            )
        if leg.encode_failures >= MAX_FAILURES:
            return event.error
        leg.avoided_encoders.add(event.encoder)
        self._ask(leg, missing)
        return None


def _hash_of(error: EmbeddingLostError) -> bytes | None:
    """The item that the error names; None when it does not."""
    try:
        return bytes.fromhex(error.metadata.get("media", "")) or None
    except ValueError:
        return None
