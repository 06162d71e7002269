"""One hand-off on its way into this engine: what is pulled of each KV group, what the source said, how long it took.

All blocks are the pulls' until the hand-off arrives, breaks or is aborted; until then `sequence.blocks` stays empty.
Knows no connectors, pools or clocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from kvrelay_core.errors import KvRelayError, MismatchError
from kvrelay_core.request import FirstToken, HandoffTiming
from kvrelay_engine.block_pool import NULL_BLOCK
from kvrelay_engine.group_pull import GroupPull, PostedRead
from kvrelay_engine.messages import HandoffComplete
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.block_digest import BlockDigest
from kvrelay_transfer.layout import KvLayout, check_groups
from kvrelay_transfer.ticket import KvTicket


def check_ticket(ticket: KvTicket, sequence: Sequence, layouts: SequenceOf[KvLayout], model_fingerprint: bytes) -> None:
    """Raises MismatchError unless the ticket is for the tokens of `sequence`, this model and the content of `layouts`.

    The hashes are recomputed from our own tokens, so that nobody can plant KV under another prompt's hash
    (PROTOCOL D2). A ticket of a lower attempt is as good as its lease: who holds it may try decode once more, and
    does so under a higher attempt (C4). One of a higher attempt, or of another request, was mixed up.
    """
    attempt = sequence.request.attempt
    if ticket.attempt.request_key != attempt.request_key or ticket.attempt.attempt > attempt.attempt:
        raise MismatchError(
            f"the ticket was issued for attempt {ticket.attempt.attempt} of {ticket.attempt.request_id}, this is "
            f"attempt {attempt.attempt} of {attempt.request_id}; send a request with the ticket of its own prefill"
        )
    check_groups(layouts, ticket.layouts)
    if ticket.model_fingerprint != model_fingerprint:
        raise MismatchError("the ticket is for another model or other weights; start both workers with one checkpoint")
    if ticket.num_tokens != len(sequence.tokens):
        raise MismatchError(f"the ticket covers {ticket.num_tokens} tokens, the request has {len(sequence.tokens)}")
    check_blocks(ticket)
    if ticket.unit_hashes != sequence.chain.cover(sequence.tokens):
        raise MismatchError("the ticket's block hashes are not those of the request's tokens")


def check_blocks(ticket: KvTicket) -> None:
    """Raises MismatchError unless the ticket lists, of each group, the blocks that the token behind its tokens sees."""
    is_whole = [group.group for group in ticket.groups] == list(range(len(ticket.layouts)))
    for group, layout in zip(ticket.groups, ticket.layouts, strict=False):
        first, num_blocks = layout.first_block(ticket.num_tokens), layout.blocks_for(ticket.num_tokens)
        is_whole &= group.first_token == first * layout.block_tokens
        is_whole &= len(group.blocks) == len(group.words) == num_blocks - first and NULL_BLOCK not in group.blocks
    if not is_whole:
        raise MismatchError(f"the ticket does not list the blocks of its {ticket.num_tokens} tokens")


@dataclass(slots=True, eq=False)
class Incoming:
    sequence: Sequence
    ticket: KvTicket
    pulls: tuple[GroupPull, ...]  # of each group
    first_tokens: tuple[FirstToken, ...] | None = None  # None until the source said Complete
    failure: KvRelayError | None = None  # reported from outside; breaks the hand-off at the next poll
    waiting_since_s: float | None = None  # for room or for the link to the peer
    reading_since_s: float | None = None
    reading_s: float = 0.0  # time with a read under way

    @property
    def request_id(self) -> int:
        return self.sequence.request.id

    @property
    def full(self) -> GroupPull:
        return self.pulls[0]

    @property
    def num_reads(self) -> int:
        return sum(len(pull.reads) for pull in self.pulls)

    def reads(self) -> Iterator[PostedRead]:
        """Under way."""
        return (read for pull in self.pulls for read in pull.reads)

    @property
    def is_all_posted(self) -> bool:
        """Nothing is missing but reads under way."""
        return self.first_tokens is not None and all(pull.is_all_posted for pull in self.pulls)

    @property
    def is_announced(self) -> bool:
        """Something may be read."""
        return any(pull.num_ready > pull.plan.source_first for pull in self.pulls)

    @property
    def has_blocks(self) -> bool:
        return bool(self.full.blocks)

    @property
    def is_whole(self) -> bool:
        """Everything is here and verified, and the source said that it was everything."""
        return self.first_tokens is not None and all(pull.is_whole for pull in self.pulls)

    @property
    def num_kept(self) -> int:
        """Of our blocks of the full group, those whose KV is of use if the hand-off breaks now. Where there is another
        group, nothing is before all is here; but what was verified stays cached."""
        if len(self.pulls) > 1:
            return 0
        return min(self.full.num_usable, self.full.plan.full_local_blocks)

    # ------------------------------------------------------------------------- what the source announces

    def announce(self, num_blocks: tuple[int, ...], digests: tuple[BlockDigest, ...] = ()) -> None:
        """Ready, of each group."""
        if len(num_blocks) != len(self.pulls):
            raise MismatchError(f"the source announced {num_blocks}, the ticket has {len(self.pulls)} groups")
        for pull, count in zip(self.pulls, num_blocks, strict=True):
            pull.announce(count)
        for digest in digests:
            if digest.group < len(self.pulls):  # else it is of no block that we read
                self.pulls[digest.group].digests[digest.block] = digest.digest

    def complete(self, message: HandoffComplete) -> None:
        """Complete: the rest is ready too. The partial blocks have to be those that were signed."""
        if message.partial != tuple(partial for pull in self.pulls if (partial := pull.partial)):
            raise MismatchError("the source's last, partial block is not the one in the ticket")
        if len(message.first_tokens) != len(self.sequence.request.generation.choices):
            raise MismatchError(
                f"the source sent {len(message.first_tokens)} first tokens for "
                f"{len(self.sequence.request.generation.choices)} choices"
            )
        if self.first_tokens is None:
            self.first_tokens = message.first_tokens
            for pull in self.pulls:
                pull.complete()

    # ----------------------------------------------------------------------------------------------- time

    def note_reading(self, now_s: float) -> None:
        """Keeps `reading_s`: the time during which at least one read was under way."""
        if self.reading_since_s is not None:
            self.reading_s += now_s - self.reading_since_s
        self.reading_since_s = now_s if self.num_reads else None

    def timing(self) -> HandoffTiming:
        """Of a hand-off that is whole; blocks are ours, of the full group."""
        full = self.full
        num_pulled, pulled_bytes = len(full.blocks) - full.num_reused, sum(pull.pulled_bytes for pull in self.pulls)
        connector = next((pull.connector for pull in self.pulls if pull.connector), "")
        return HandoffTiming(pulled_bytes, self.reading_s, num_pulled, full.num_reused, connector)
