"""What of one KV group is pulled for a hand-off: what was announced, posted and verified so far.

What the source says and what is read counts in the ticket's blocks, `blocks` in ours; both are counted from token 0 on,
also in a group whose ticket begins later, and `plan` knows which is which. All of `blocks` are this object's until the
hand-off arrives, breaks or is aborted. Knows no connectors, pools or clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from kvrelay_core.errors import MismatchError, StaleTicketError
from kvrelay_engine.block_pool import NULL_BLOCK
from kvrelay_engine.pull_plan import PullPlan
from kvrelay_transfer.connectors.base import BlockRead, Blocks, Transfer, as_blocks
from kvrelay_transfer.fence import WordArray, agree
from kvrelay_transfer.ticket import GroupBlocks, KvTicket


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
class GroupPull:
    ticket: KvTicket
    group: GroupBlocks
    keys: list[bytes]  # prefix-cache keys of our first blocks
    plan: PullPlan
    num_ready: int = 0  # of the ticket's blocks, those that may be read
    blocks: list[int] = field(default_factory=list)  # null before the first that is of use
    num_reused: int = 0  # of `blocks`, those that need not be read: of our own prefix cache, or null
    num_posted: int = 0  # of the ticket's blocks, those that are here or asked for
    num_verified: int = 0  # of the ticket's blocks, from the start, whose data is here and whose words agreed
    pulled_bytes: int = 0
    reads: list[PostedRead] = field(default_factory=list)
    connector: str = ""
    digests: dict[int, bytes] = field(default_factory=dict)  # of the source's blocks, those that it told of
    _verified_ahead: dict[int, int] = field(default_factory=dict)  # first block -> end, behind a gap
    _remote: Blocks = field(init=False)  # the ticket's, as arrays
    _words: WordArray = field(init=False)

    def __post_init__(self) -> None:
        self.num_ready = self.plan.source_first
        self._remote = as_blocks(self.group.blocks)
        self._words = np.array(self.group.words, np.uint64)

    @property
    def num_usable(self) -> int:
        """Of our own blocks, from the start, those that hold verified KV."""
        return max(self.num_reused, self.plan.local_blocks_in(self.num_verified))

    @property
    def num_held(self) -> int:
        return len(self.blocks) - self.plan.local_first

    @property
    def is_all_posted(self) -> bool:
        """Nothing is missing but reads under way."""
        return bool(self.blocks) and self.num_posted == self.plan.source_blocks

    @property
    def is_whole(self) -> bool:
        return bool(self.blocks) and self.num_verified == self.plan.source_blocks

    @property
    def num_full_blocks(self) -> int:
        return self.ticket.num_tokens // self.ticket.layouts[self.group.group].block_tokens

    @property
    def partial(self) -> GroupBlocks | None:
        """The last block, where it is not full."""
        return self.group.behind(self.num_full_blocks, self.ticket.layouts[self.group.group].block_tokens)

    # ------------------------------------------------------------------------- what the source announces

    def announce(self, num_blocks: int) -> None:
        """So many of the group's blocks may be read: cumulative, so one that repeats or falls back tells nothing."""
        num_ready, most = self.plan.source_first + num_blocks, max(self.plan.source_first, self.num_full_blocks)
        if num_ready > most:
            raise MismatchError(f"the source announced {num_blocks} blocks, the ticket has {self.num_full_blocks}")
        self.num_ready = max(self.num_ready, num_ready)

    def complete(self) -> None:
        self.num_ready = self.plan.source_blocks

    # ---------------------------------------------------------------------------------------------- reads

    def take(self, reused: SequenceOf[int], reserved: SequenceOf[int]) -> None:
        """All our blocks: some of the first ones hold their KV already."""
        first = self.plan.local_first
        self.blocks = [NULL_BLOCK] * first + [*reused, *reserved]
        self.num_reused = first + len(reused)
        self.num_posted = self.num_verified = max(self.plan.source_first, self.plan.source_blocks_in(self.num_reused))

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
        positions = pairs.remote - self.plan.source_first
        remote, words = self._remote[positions], self._words[positions]
        wanted = BlockRead(self.ticket, self.group.group, remote, as_blocks(self.blocks)[pairs.local], pairs.slices)
        size_bytes = self.plan.size_bytes(pairs)
        return PostedRead(first, end, wanted, words, size_bytes, read(wanted), peer_id, connector)

    def check_words(self, read: PostedRead) -> None:
        """Compares the words that followed the data with the ticket's (PROTOCOL A6): all or nothing. Raises
        StaleTicketError."""
        if not agree(read.transfer.words, read.expected_words):
            raise StaleTicketError(
                "blocks of the ticket were reused before they were read; nothing of that read is used",
                ticket_id=self.ticket.ticket_id,
            )

    def accept(self, read: PostedRead) -> list[tuple[int, bytes]]:
        """The read was checked. Returns blocks of ours that are whole by it, with their keys."""
        before = max(self.num_usable, self.plan.local_whole)
        self.pulled_bytes += read.size_bytes
        self._verified_ahead[read.first] = read.end
        while (end := self._verified_ahead.pop(self.num_verified, None)) is not None:
            self.num_verified = end
        return list(zip(self.blocks[before : self.num_usable], self.keys[before:], strict=False))

    def unused_blocks(self, kept: int) -> list[int]:
        """Blocks after the first `kept` that no read can still write to."""
        posted = {block for read in self.reads for block in read.blocks}
        return [block for block in self.blocks[kept:] if block not in posted and block != NULL_BLOCK]
