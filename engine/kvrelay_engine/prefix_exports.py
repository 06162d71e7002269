"""Tickets for what is in the prefix cache anyway: another worker may read it instead of computing it again.

Nobody pins these blocks (PROTOCOL B1: pinning them would let two workers that read from each other deadlock). They
may be reused at any time, before or under the read; the fence words tell. Such a ticket needs no record here: its
signature says that it is ours, its words say whether it still holds.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from kvrelay_core.clock import Clock
from kvrelay_core.errors import TransferError
from kvrelay_core.hashing import HASH_BYTES
from kvrelay_core.request import AttemptId
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.kv_group import FULL_GROUP
from kvrelay_engine.prefix_cache import find_hit
from kvrelay_engine.sliding_blocks import SlidingBlocks
from kvrelay_transfer.layout import KvLayout, block_keys
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms, TicketSigner

# How long after a ticket its reads may come: as long a reader takes at the most (`prefix_pulls.PullLimits`), and more.
READ_WINDOW_S = 10.0
NO_LEASE = LeaseTerms(first_follow_s=0.0, beat_s=0.0, missed_beats=0, lost_grace_s=0.0, wall_cap_s=0.0)


class PrefixExports:
    def __init__(
        self,
        pool: BlockPool,
        layout: KvLayout,
        identity: EngineIdentity,
        signer: TicketSigner,
        clock: Clock,
        sliding: SlidingBlocks | None = None,
    ) -> None:
        self._sliding = sliding
        self._pool = pool
        self._layout = layout
        self._identity = identity
        self._signer = signer
        self._clock = clock
        self._awaited_until_s = 0.0

    @property
    def is_awaiting(self) -> bool:
        """Reads of a ticket issued lately may still come."""
        return self._clock.now() < self._awaited_until_s

    def lookup(self, attempt: AttemptId, unit_hashes: bytes) -> KvTicket | None:
        """The longest cached prefix of the chain, in whole hash units; None when not even the first is here.

        `unit_hashes`: 32 bytes for each full unit of the reader's tokens, in order. `attempt` is the reader's.
        """
        units = [unit_hashes[start : start + HASH_BYTES] for start in range(0, len(unit_hashes), HASH_BYTES)]
        keys = block_keys(units, self._layout)
        blocks = tuple(find_hit(self._pool, self._layout, self._sliding, keys))
        if not blocks:
            return None
        self._awaited_until_s = self._clock.now() + READ_WINDOW_S
        num_tokens = len(blocks) * self._layout.block_tokens
        num_units = num_tokens // self._layout.hash_unit_tokens
        return self._signer.sign(
            KvTicket(
                ticket_id=secrets.token_hex(16),
                source_id=self._identity.worker_id,
                source_address=self._identity.address,
                engine_epoch=self._identity.engine_epoch,
                attempt=attempt,
                model_fingerprint=self._identity.model_fingerprint,
                layout=self._layout,
                groups=self._groups(blocks, keys[: len(blocks)]),
                num_tokens=num_tokens,
                unit_hashes=b"".join(units[:num_units]),
                lease=NO_LEASE,
                is_pinned=False,
                more_layouts=() if self._sliding is None else (self._sliding.layout,),
            )
        )

    def _groups(self, blocks: tuple[int, ...], keys: Sequence[bytes]) -> tuple[GroupBlocks, ...]:
        full = GroupBlocks(FULL_GROUP, 0, blocks, tuple(map(self._pool.word, blocks)))
        return (full,) if self._sliding is None else (full, self._sliding.cached(keys))

    def check(self, ticket: KvTicket, group: int, blocks: Sequence[int]) -> None:
        """Of a ticket whose signature was verified. Raises TransferError for blocks that it does not list."""
        if group >= len(ticket.groups) or not set(blocks) <= set(ticket.groups[group].blocks):
            raise TransferError("blocks were asked for that the ticket does not list")
