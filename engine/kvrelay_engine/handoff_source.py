"""The prefill side of hand-offs: issues tickets, pins their blocks under a lease, tells readers what is sealed.

    accept    a request's blocks are reserved: ticket out, blocks pinned           (PROTOCOL B1, B6)
    sealed    steps completed: Ready to the reader that follows                     (A2, B7)
    finished  the first tokens are sampled: Complete, with the last, partial block
    failed    the request ended early: Failed, pins back

A reader may attach before, between or after these; it is told the current state at once. The record of a
ticket lives until its lease ends, also when the request itself is long gone. Every use of a ticket begins with
its signature (D1). Streams are the service's part: here a stream is a number.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from msgspec.structs import replace

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import (
    InternalError,
    KvRelayError,
    LeaseExpiredError,
    SupersededError,
    TicketRejectedError,
    TransferError,
)
from kvrelay_core.request import FirstToken
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.engine_identity import EngineIdentity
from kvrelay_engine.kv_group import FULL_GROUP, SLIDING_GROUP, GroupGate, KvGroup, SlotWriter
from kvrelay_engine.messages import (
    Command,
    Event,
    Export,
    Exported,
    FollowAttach,
    FollowAttached,
    FollowBeat,
    FollowComplete,
    FollowFailed,
    FollowLost,
    FollowReady,
    FollowRelease,
    PrefillStreamClosed,
    Released,
    ReleaseReason,
    ReleaseTicket,
)
from kvrelay_engine.prefix_exports import PrefixExports
from kvrelay_engine.prefix_messages import LookupPrefix, PrefixTicket
from kvrelay_engine.sequence import Sequence
from kvrelay_engine.sliding_blocks import SlidingBlocks
from kvrelay_transfer.block_digest import BlockDigest, BlockDigester
from kvrelay_transfer.connectors.base import Connector, ExportGate
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.lease import Lease, LeaseEnd, LeaseTable
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms, Ticket, TicketSigner

# The slowest connector that a pull is given time for (PROTOCOL B5).
SLOWEST_PULL_BYTES_PER_S = 0.2e9


@dataclass(slots=True, eq=False)
class _Handoff:
    """One ticket and what has become of its request."""

    request_id: int
    sequence: Sequence
    ticket: KvTicket
    num_sealed: int  # full blocks, from the first token on
    first_tokens: tuple[FirstToken, ...] | None = None  # None until complete
    num_digested: tuple[int, ...] = ()  # of each group's blocks, those that were digested or passed over
    digests: list[BlockDigest] = field(default_factory=list)

    @property
    def num_full_blocks(self) -> int:
        return self.ticket.num_tokens // self.ticket.layout.block_tokens

    @property
    def num_ready(self) -> tuple[int, ...]:
        """Of each group's blocks in the ticket, those that are sealed."""
        block_tokens = self.ticket.layout.block_tokens
        return tuple(max(0, self.num_sealed - group.first_token // block_tokens) for group in self.ticket.groups)

    @property
    def partial(self) -> tuple[GroupBlocks, ...]:
        """The last block of each group, where it is not full."""
        return tuple(
            partial
            for group in self.ticket.groups
            if (partial := group.behind(self.num_full_blocks, self.ticket.layout.block_tokens))
        )

    def exportable(self, group: int) -> tuple[int, ...]:
        """Blocks of the group that may be read now."""
        if group >= len(self.ticket.groups):
            return ()
        blocks = self.ticket.groups[group].blocks
        return blocks if self.first_tokens is not None else blocks[: self.num_ready[group]]


class HandoffSource:
    def __init__(
        self,
        pool: BlockPool,
        layout: KvLayout,
        identity: EngineIdentity,
        signer: TicketSigner,
        terms: LeaseTerms,
        max_pinned_share: float,
        clock: Clock,
        emit: Callable[[Event], None],
        *,
        staging: SlotWriter | None = None,
        connectors: Collection[Connector] = (),
        sliding: SlidingBlocks | None = None,
        digester: BlockDigester | None = None,
    ) -> None:
        """`terms.wall_cap_s` is the least wall cap; long tickets get more. Without `staging` exports fail.

        `digester` digests a share of the full blocks, so that readers can tell whether they got them.
        `connectors` serve while there are tickets. The ticket names what `sliding` keeps, too.
        """
        self._pool = pool
        self._layout = layout
        self._identity = identity
        self._signer = signer
        self._terms = terms
        self._emit = emit
        self._sliding = sliding
        self._groups = [KvGroup(index=FULL_GROUP, pool=pool, layout=layout, staging=staging, digester=digester)]
        self._gates: list[tuple[Connector, ExportGate]] = [(connector, self) for connector in connectors]
        if sliding is not None:
            self._groups.append(sliding.group)
            self._gates = [(connector, GroupGate(self, FULL_GROUP)) for connector in connectors]
            gate = GroupGate(self, SLIDING_GROUP)
            self._gates += [(connector, gate) for connector in sliding.group.connectors.values()]
        self._is_serving = False
        self._exports = PrefixExports(pool, layout, identity, signer, clock, sliding)
        self._leases = LeaseTable(clock, self._lease_ended)
        self._by_ticket: dict[str, _Handoff] = {}
        self._by_request: dict[int, _Handoff] = {}
        self.max_pinned_blocks = int(max_pinned_share * (pool.num_blocks - 1))
        self.num_expired = 0

    @property
    def num_leases(self) -> int:
        return self._leases.num_leases

    @property
    def num_pinned(self) -> int:
        """Unique blocks under a lease."""
        return self._leases.num_pinned

    # ---------------------------------------------------------------------- what the engine loop reports

    def can_accept(self, num_blocks: int, shared: Set[int] = frozenset()) -> bool:
        """Whether `num_blocks` that nobody holds yet, and the `shared` ones, fit under the cap of pinned blocks.

        Each block counts once: of the shared ones those that are not under a lease already (PROTOCOL B5).
        """
        num_more = num_blocks + sum(not self._leases.is_pinned(block) for block in shared)
        return self.num_pinned + num_more <= self.max_pinned_blocks

    def accept(self, sequence: Sequence) -> KvTicket:
        """Issues the ticket of a sequence whose blocks, cached and reserved, cover all its tokens; pins them.

        `sequence.num_computed` tells which of them are cached, thus sealed.
        """
        num_tokens = len(sequence.tokens)
        num_blocks = self._layout.blocks_for(num_tokens)
        assert len(sequence.blocks) >= num_blocks, "blocks are reserved before the ticket is issued"
        blocks = tuple(sequence.blocks[:num_blocks])
        words = tuple(self._pool.word(block) for block in blocks)
        sliding = () if self._sliding is None else (self._sliding.lease(sequence),)
        ticket = self._signer.sign(
            KvTicket(
                ticket_id=secrets.token_hex(16),
                source_id=self._identity.worker_id,
                source_address=self._identity.address,
                engine_epoch=self._identity.engine_epoch,
                attempt=sequence.request.attempt,
                model_fingerprint=self._identity.model_fingerprint,
                layout=self._layout,
                groups=(GroupBlocks(FULL_GROUP, 0, blocks, words), *sliding),
                num_tokens=num_tokens,
                unit_hashes=sequence.chain.cover(sequence.tokens),
                lease=self._terms_for(num_blocks),
                more_layouts=tuple(group.layout for group in self._groups[1:]),
            )
        )
        num_cached = min(sequence.num_computed, num_tokens) // self._layout.block_tokens
        handoff = _Handoff(sequence.request.id, sequence, ticket, num_cached)
        self._pool.pin(blocks)
        self._digest(handoff)
        self._by_ticket[ticket.ticket_id] = handoff
        self._by_request[handoff.request_id] = handoff
        self._leases.grant(ticket.ticket_id, blocks, ticket.lease)
        self._serve()
        return ticket

    def sealed(self, sequence: Sequence, num_blocks: int) -> None:
        """The first `num_blocks` blocks are full and every step that wrote to them has completed."""
        handoff = self._by_request.get(sequence.request.id)
        if handoff is None:
            return
        num_sealed = min(num_blocks, handoff.num_full_blocks)
        if num_sealed > handoff.num_sealed:
            handoff.num_sealed = num_sealed
            self._digest(handoff)
            self._tell(handoff, self._ready)

    def finished(self, sequence: Sequence, first_tokens: tuple[FirstToken, ...]) -> None:
        """All KV of the ticket is in the pool, the last step completed, and each choice has its first token."""
        handoff = self._by_request.get(sequence.request.id)
        if handoff is None:
            return
        handoff.num_sealed = handoff.num_full_blocks
        if self._digest(handoff):
            self._tell(handoff, self._ready)
        handoff.first_tokens = first_tokens
        self._leases.complete(handoff.ticket.ticket_id)
        self._tell(handoff, self._complete)

    def failed(self, request_id: int, error: KvRelayError) -> None:
        """The request ended before, or was cancelled: its ticket is worthless."""
        handoff = self._by_request.get(request_id)
        if handoff is not None:
            self._tell(handoff, lambda _, follow: FollowFailed(follow, info_of(error)))
            self._leases.end(handoff.ticket.ticket_id, LeaseEnd.REQUEST_FAILED)

    def tick(self) -> None:
        """Ends leases whose time is over. Call after the commands that have queued up were handled."""
        self._leases.tick()
        self._serve()

    # ---------------------------------------------------------------------------- what the service sends

    def handle(self, command: Command) -> None:
        match command:
            case FollowAttach(follow, ticket):
                self._attach(follow, ticket)
            case FollowBeat(follow):
                self._leases.beat(follow)
            case FollowLost(follow):
                self._leases.lose(follow)
            case FollowRelease(follow, ReleaseReason.REFUSED):
                self._leases.refuse(follow)
            case FollowRelease(follow, _):
                self._leases.leave(follow)
            case ReleaseTicket(call, ticket):
                self._release(call, ticket)
            case PrefillStreamClosed(request_id):
                self._close_stream(request_id)
            case Export():
                self._export(command)
            case LookupPrefix(call, attempt, unit_hashes):
                self._emit(PrefixTicket(call, self._exports.lookup(attempt, unit_hashes)))
                self._serve()
            case _:
                raise InternalError(f"the hand-off source was given a {type(command).__name__}")

    def _attach(self, follow: int, ticket: KvTicket) -> None:
        try:
            self._signer.verify(ticket)
            superseded = self._leases.attach(ticket.ticket_id, follow)
        except (TicketRejectedError, LeaseExpiredError) as error:
            self._emit(FollowFailed(follow, info_of(error)))
            return
        if superseded is not None:
            takeover = SupersededError("another reader follows the ticket now", ticket_id=ticket.ticket_id)
            self._emit(FollowFailed(superseded, info_of(takeover)))
        handoff = self._by_ticket[ticket.ticket_id]
        self._emit(FollowAttached(follow, ticket.lease))
        self._emit(self._ready(handoff, follow))
        if handoff.first_tokens is not None:
            self._emit(self._complete(handoff, follow))

    def _release(self, call: int, ticket: Ticket) -> None:
        try:
            self._signer.verify(ticket)
        except TicketRejectedError as error:
            self._emit(Released(call, False, info_of(error)))
            return
        self._emit(Released(call, self._leases.end(ticket.ticket_id, LeaseEnd.RELEASED)))

    def _close_stream(self, request_id: int) -> None:
        handoff = self._by_request.get(request_id)
        if handoff is not None:
            self._leases.close_stream(handoff.ticket.ticket_id)

    def _export(self, export: Export) -> None:
        try:
            words = self._copy_out(export)
        except (TicketRejectedError, LeaseExpiredError, TransferError) as error:
            self._emit(Exported(export.export, (), info_of(error)))
            return
        self._emit(Exported(export.export, words))

    def check_export(self, ticket: Ticket, group: int, blocks: SequenceOf[int]) -> None:
        """As `ExportGate` says. Another thread may see a state that is a moment old; the words make up for that."""
        self._signer.verify(ticket)
        if not isinstance(ticket, KvTicket):
            raise TicketRejectedError("this engine holds KV, and the ticket is for an embedding", cause="kind")
        if not ticket.is_pinned:
            self._exports.check(ticket, group, blocks)
            return
        handoff = self._by_ticket.get(ticket.ticket_id)
        if handoff is None:
            raise LeaseExpiredError("the lease of the ticket has ended; prefill again")
        if not set(blocks) <= set(handoff.exportable(group)):
            raise TransferError("blocks were asked for that the ticket does not list or that are not sealed yet")

    def _copy_out(self, export: Export) -> tuple[int, ...]:
        """Data first, then the words (PROTOCOL A6)."""
        self.check_export(export.ticket, export.group, export.blocks)
        group = self._groups[export.group]
        if group.staging is None:
            raise TransferError("this engine has no staging ring; it cannot serve Fetch")
        group.staging.copy_out(export.blocks, export.slot)
        return tuple(group.pool.word(block) for block in export.blocks)

    # ------------------------------------------------------------------------------------------ internal

    def _serve(self) -> None:
        is_wanted = self._leases.num_leases > 0 or self._exports.is_awaiting
        if is_wanted is not self._is_serving:
            self._is_serving = is_wanted
            for connector, gate in self._gates:
                connector.serve(gate if is_wanted else None)

    def _digest(self, handoff: _Handoff) -> bool:
        """Digests a share of the blocks that were sealed since the last time; whether there were any such."""
        before, num_ready = handoff.num_digested or (0,) * len(self._groups), handoff.num_ready
        handoff.num_digested = num_ready
        num_digests = len(handoff.digests)
        for group, done, ready, named in zip(self._groups, before, num_ready, handoff.ticket.groups, strict=True):
            for block in named.blocks[done:ready]:
                if group.digester is not None and group.digester.picks():
                    handoff.digests.append(BlockDigest(group.index, block, group.digester.digest(block)))
        return len(handoff.digests) > num_digests

    def _terms_for(self, num_blocks: int) -> LeaseTerms:
        block_bytes = sum(group.layout.block_bytes for group in self._groups)
        pull_s = num_blocks * block_bytes / SLOWEST_PULL_BYTES_PER_S
        return replace(self._terms, wall_cap_s=max(self._terms.wall_cap_s, 4 * pull_s))

    def _tell(self, handoff: _Handoff, message: Callable[[_Handoff, int], Event]) -> None:
        lease = self._leases.find(handoff.ticket.ticket_id)
        if lease is not None and lease.follow is not None:
            self._emit(message(handoff, lease.follow))

    def _ready(self, handoff: _Handoff, follow: int) -> Event:
        return FollowReady(follow, handoff.num_ready, tuple(handoff.digests))

    def _complete(self, handoff: _Handoff, follow: int) -> Event:
        assert handoff.first_tokens is not None
        return FollowComplete(follow, handoff.first_tokens, handoff.partial)

    def _lease_ended(self, lease: Lease, reason: LeaseEnd) -> None:
        handoff = self._by_ticket.pop(lease.ticket_id)
        del self._by_request[handoff.request_id]
        self._pool.release(lease.blocks, handoff.sequence.last_step)
        if self._sliding is not None:
            self._sliding.end_lease(handoff.sequence, handoff.ticket.groups[SLIDING_GROUP].blocks)
        self.num_expired += reason.is_expiry
        self._serve()
        is_news = reason not in (LeaseEnd.LEFT, LeaseEnd.REQUEST_FAILED)
        if lease.follow is not None and is_news:
            error = LeaseExpiredError(f"the lease of the ticket ended: {reason.value}", ticket_id=lease.ticket_id)
            self._emit(FollowFailed(lease.follow, info_of(error)))
