"""The ticket: a signed list of blocks and fence words that lets another worker read the KV of one attempt, or the
embedding of one media item.

Rules: PROTOCOL A1, A3, D1 in docs/protocol.md. The signature is keyed by the issuing engine's epoch, so only
the issuer verifies it and a ticket of an earlier start is refused.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TypeVar

import msgspec
from msgspec import Struct

from kvrelay_core.errors import TicketRejectedError
from kvrelay_core.request import AttemptId
from kvrelay_transfer.embedding_layout import EmbeddingLayout
from kvrelay_transfer.layout import KvLayout


class GroupBlocks(Struct, frozen=True, array_like=True):
    """Blocks of one KV group in token order; words[i] is the fence word of blocks[i].

    Of a group with a window they begin at `first_token`, with the first block that the token behind the ticket's sees.
    """

    group: int
    first_token: int
    blocks: tuple[int, ...]
    words: tuple[int, ...]

    def behind(self, num_blocks: int, block_tokens: int) -> GroupBlocks | None:
        """What lies behind the first `num_blocks` from token 0 on; None where that is nothing."""
        skipped = num_blocks - self.first_token // block_tokens
        if skipped >= len(self.blocks):
            return None
        return GroupBlocks(self.group, num_blocks * block_tokens, self.blocks[skipped:], self.words[skipped:])


class LeaseTerms(Struct, frozen=True, array_like=True):
    """Durations on the issuer's clock (PROTOCOL B)."""

    first_follow_s: float = 30.0
    beat_s: float = 1.0
    missed_beats: int = 3
    lost_grace_s: float = 2.0
    wall_cap_s: float = 10.0


class KvTicket(Struct, frozen=True, array_like=True, tag="kv"):
    ticket_id: str
    source_id: str
    source_address: str
    engine_epoch: bytes
    attempt: AttemptId
    model_fingerprint: bytes
    layout: KvLayout
    groups: tuple[GroupBlocks, ...]
    num_tokens: int
    unit_hashes: bytes  # of the full hash units and of the rest behind them, 32 bytes each
    lease: LeaseTerms
    mac: bytes = b""
    is_pinned: bool = True  # False: an export for reuse, which lives by the fence alone (PROTOCOL B1)
    more_layouts: tuple[KvLayout, ...] = ()  # of the groups behind the first

    @property
    def layouts(self) -> tuple[KvLayout, ...]:
        """Of each group."""
        return (self.layout, *self.more_layouts)

    def canonical_bytes(self) -> bytes:
        """What the signature covers: every field but the signature."""
        return msgspec.msgpack.encode(msgspec.structs.replace(self, mac=b""))


class EmbeddingTicket(Struct, frozen=True, array_like=True, tag="embeddings"):
    """The right to read the rows [num_tokens, hidden] of one media item: blocks in token order, words alike.

    Its lease has no stream: `lease.first_follow_s` after it was issued the pins are gone, unless a Release came
    before. Afterwards the words alone tell whether the item is still there.
    """

    ticket_id: str
    source_id: str
    source_address: str
    engine_epoch: bytes
    content_hash: bytes
    encoder_fingerprint: bytes
    layout: EmbeddingLayout
    blocks: tuple[int, ...]
    words: tuple[int, ...]
    num_tokens: int
    lease: LeaseTerms
    mac: bytes = b""

    def canonical_bytes(self) -> bytes:
        """What the signature covers: every field but the signature."""
        return msgspec.msgpack.encode(msgspec.structs.replace(self, mac=b""))


Ticket = KvTicket | EmbeddingTicket
T = TypeVar("T", KvTicket, EmbeddingTicket)


class TicketSigner:
    """Holds the key of one engine epoch."""

    def __init__(self, key: bytes, engine_epoch: bytes) -> None:
        self._key = key
        self._engine_epoch = engine_epoch

    def sign(self, ticket: T) -> T:
        return msgspec.structs.replace(ticket, mac=self._mac(ticket))

    def verify(self, ticket: Ticket) -> None:
        """Raises TicketRejectedError unless this very engine start issued the ticket as it is."""
        if ticket.engine_epoch != self._engine_epoch:
            raise TicketRejectedError("the ticket is of another engine start; ask its source again", cause="epoch")
        if not hmac.compare_digest(ticket.mac, self._mac(ticket)):
            raise TicketRejectedError("the ticket's signature does not match its content", cause="mac")

    def _mac(self, ticket: Ticket) -> bytes:
        return hmac.digest(self._key, ticket.canonical_bytes(), hashlib.sha256)
