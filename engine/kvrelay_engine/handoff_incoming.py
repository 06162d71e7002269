"""One hand-off on its way into this engine: what was announced, posted and verified so far.

What the source says and what is read counts in the ticket's blocks, `blocks` in ours; `plan` knows which is which.
All of `blocks` are this object's until the hand-off arrives, breaks or is aborted; until then `sequence.blocks`
stays empty. Knows no connectors, pools or clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from kvrelay_core.errors import KvRelayError, MismatchError, StaleTicketError, UnsupportedError
from kvrelay_core.request import FirstToken, HandoffTiming
from kvrelay_engine.block_pool import NULL_BLOCK
from kvrelay_engine.messages import HandoffComplete
from kvrelay_engine.pull_plan import PullPlan
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.connectors.base import BlockRead, Blocks, Transfer, as_blocks
from kvrelay_transfer.fence import WordArray, agree
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import GroupBlocks, KvTicket


def check_ticket(ticket: KvTicket, sequence: Sequence, layout: KvLayout, model_fingerprint: bytes) -> None:
    """Raises MismatchError unless the ticket is for the tokens of `sequence`, this model and the content of `layout`.

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
    layout.check_compatible(ticket.layout)
    if ticket.model_fingerprint != model_fingerprint:
        raise MismatchError("the ticket is for another model or other weights; start both workers with one checkpoint")
    if ticket.num_tokens != len(sequence.tokens):
        raise MismatchError(f"the ticket covers {ticket.num_tokens} tokens, the request has {len(sequence.tokens)}")
    if len(ticket.groups) != 1:
        raise UnsupportedError(f"this worker reads one KV group, the ticket has {len(ticket.groups)}")
    group, num_blocks = ticket.groups[0], ticket.layout.blocks_for(ticket.num_tokens)
    is_whole = group.first_token == 0 and len(group.blocks) == len(group.words) == num_blocks
    if not is_whole or NULL_BLOCK in group.blocks:
        raise MismatchError(f"the ticket does not list the {num_blocks} blocks of its {ticket.num_tokens} tokens")
    if ticket.unit_hashes != sequence.chain.cover(sequence.tokens):
        raise MismatchError("the ticket's block hashes are not those of the request's tokens")


@dataclass(slots=True, eq=False)
class PostedRead:
    """A read of the ticket's blocks [first, end)."""

    first: int
    end: int
    read: BlockRead
    expected_words: WordArray
    size_bytes: int
    transfer: Transfer
    peer_id: str
    connector: str
    is_second_try: bool = False

    @property
    def is_quick(self) -> bool:
        """It takes a fraction of a step."""
        return self.transfer.poll_s < Transfer.poll_s

    @property
    def blocks(self) -> tuple[int, ...]:
        """The local destination, each block once."""
        return tuple(dict.fromkeys(self.read.local_blocks))


@dataclass(slots=True, eq=False)
class Incoming:
    sequence: Sequence
    ticket: KvTicket
    keys: list[bytes]  # prefix-cache keys of our first blocks
    plan: PullPlan
    num_ready: int = 0  # of the ticket's blocks, those that may be read
    first_tokens: tuple[FirstToken, ...] | None = None  # None until the source said Complete
    failure: KvRelayError | None = None  # reported from outside; breaks the hand-off at the next poll
    blocks: list[int] = field(default_factory=list)
    num_reused: int = 0  # of `blocks`, from our own prefix cache
    num_posted: int = 0  # of the ticket's blocks, those that are here or asked for
    num_verified: int = 0  # of the ticket's blocks, from the start, whose data is here and whose words agreed
    pulled_bytes: int = 0
    reads: list[PostedRead] = field(default_factory=list)
    waiting_since_s: float | None = None  # for room or for the link to the peer
    reading_since_s: float | None = None
    reading_s: float = 0.0  # time with a read under way
    connector: str = ""
    _verified_ahead: dict[int, int] = field(default_factory=dict)  # first block -> end, behind a gap
    _remote: Blocks = field(init=False)  # the ticket's, as arrays
    _words: WordArray = field(init=False)

    def __post_init__(self) -> None:
        self._remote = as_blocks(self.group.blocks)
        self._words = np.array(self.group.words, np.uint64)

    @property
    def request_id(self) -> int:
        return self.sequence.request.id

    @property
    def group(self) -> GroupBlocks:
        return self.ticket.groups[0]

    @property
    def num_full_blocks(self) -> int:
        return self.ticket.num_tokens // self.ticket.layout.block_tokens

    @property
    def num_usable(self) -> int:
        """Of our own blocks, from the start, those that hold verified KV."""
        return max(self.num_reused, self.plan.local_blocks_in(self.num_verified))

    @property
    def is_all_posted(self) -> bool:
        """Nothing is missing but reads under way."""
        return self.first_tokens is not None and self.num_posted == len(self.group.blocks)

    @property
    def is_whole(self) -> bool:
        """Everything is here and verified, and the source said that it was everything."""
        return self.first_tokens is not None and self.num_verified == len(self.group.blocks)

    # ------------------------------------------------------------------------- what the source announces

    def announce(self, num_blocks: tuple[int, ...]) -> None:
        """Ready: cumulative, so one that repeats or falls back tells nothing new."""
        if len(num_blocks) != 1 or num_blocks[0] > self.num_full_blocks:
            raise MismatchError(f"the source announced {num_blocks} blocks, the ticket has {self.num_full_blocks}")
        self.num_ready = max(self.num_ready, num_blocks[0])

    def complete(self, message: HandoffComplete) -> None:
        """Complete: the rest is ready too. The partial block has to be the one that was signed."""
        group, first = self.group, self.num_full_blocks
        expected: tuple[GroupBlocks, ...] = ()
        if first < len(group.blocks):
            first_token = first * self.ticket.layout.block_tokens
            expected = (GroupBlocks(group.group, first_token, group.blocks[first:], group.words[first:]),)
        if message.partial != expected:
            raise MismatchError("the source's last, partial block is not the one in the ticket")
        if len(message.first_tokens) != len(self.sequence.request.generation.choices):
            raise MismatchError(
                f"the source sent {len(message.first_tokens)} first tokens for "
                f"{len(self.sequence.request.generation.choices)} choices"
            )
        if self.first_tokens is None:
            self.first_tokens = message.first_tokens
            self.num_ready = len(group.blocks)

    # ---------------------------------------------------------------------------------------------- reads

    def take(self, reserved: list[int], num_reused: int) -> None:
        """All our blocks, of which the first `num_reused` hold their KV already."""
        self.blocks, self.num_reused = reserved, num_reused
        self.num_posted = self.num_verified = self.plan.source_blocks_in(num_reused)

    def post(self, end: int, peer_id: str, connector: str, read: Callable[[BlockRead], Transfer]) -> None:
        """Posts the read of the ticket's blocks up to `end`."""
        self.reads.append(self._make_read(self.num_posted, end, peer_id, connector, read))
        self.num_posted = end

    def post_again(self, failed: PostedRead, connector: str, read: Callable[[BlockRead], Transfer]) -> None:
        """What a read that has ended was to bring, into the same blocks."""
        again = self._make_read(failed.first, failed.end, failed.peer_id, connector, read)
        again.is_second_try = True
        self.reads.append(again)

    def _make_read(
        self, first: int, end: int, peer_id: str, connector: str, read: Callable[[BlockRead], Transfer]
    ) -> PostedRead:
        self.connector = connector
        pairs = self.plan.pair(first, end, self.num_reused)
        remote, words = self._remote[pairs.remote], self._words[pairs.remote]
        wanted = BlockRead(self.ticket, self.group.group, remote, as_blocks(self.blocks)[pairs.local], pairs.slices)
        size_bytes = self.plan.size_bytes(pairs)
        return PostedRead(first, end, wanted, words, size_bytes, read(wanted), peer_id, connector)

    def verify(self, read: PostedRead) -> None:
        """Compares the words that followed the data with the ticket's (PROTOCOL A6): all or nothing."""
        if not agree(read.transfer.words, read.expected_words):
            raise StaleTicketError(
                "blocks of the ticket were reused before they were read; nothing of that read is used",
                ticket_id=self.ticket.ticket_id,
            )
        self.pulled_bytes += read.size_bytes
        self._verified_ahead[read.first] = read.end
        while (end := self._verified_ahead.pop(self.num_verified, None)) is not None:
            self.num_verified = end

    def note_reading(self, now_s: float) -> None:
        """Keeps `reading_s`: the time during which at least one read was under way."""
        if self.reading_since_s is not None:
            self.reading_s += now_s - self.reading_since_s
        self.reading_since_s = now_s if self.reads else None

    def timing(self) -> HandoffTiming:
        """Of a hand-off that is whole; blocks are ours."""
        num_pulled = len(self.blocks) - self.num_reused
        return HandoffTiming(self.pulled_bytes, self.reading_s, num_pulled, self.num_reused, self.connector)

    def unused_blocks(self, kept: int) -> SequenceOf[int]:
        """Blocks after the first `kept` that no read can still write to."""
        posted = {block for read in self.reads for block in read.blocks}
        return [block for block in self.blocks[kept:] if block not in posted]
