"""One media item on its way from an encoder's pool into ours.

The blocks are this object's until the item is whole, or was given up; those that a read may still write to are then the
quarantine's (PROTOCOL A5). Knows no requests, no pool and no peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvrelay_core.errors import KvRelayError, StaleTicketError, TransferError
from kvrelay_engine.handoff_peers import ActiveLink
from kvrelay_engine.link_health import is_worth_another_try
from kvrelay_transfer.connectors.base import BlockRead, Transfer, TransferState
from kvrelay_transfer.fence import agree
from kvrelay_transfer.ticket import EmbeddingTicket


@dataclass(slots=True, eq=False)
class _PostedRead:
    first: int  # of the ticket's blocks
    end: int
    transfer: Transfer
    connector: str
    is_second_try: bool = False


@dataclass(slots=True, eq=False)
class EmbeddingPull:
    ticket: EmbeddingTicket
    blocks: tuple[int, ...]  # ours, one for each of the ticket's
    waiting_since_s: float  # for the link
    waiters: set[int] = field(default_factory=set)  # request ids
    num_posted: int = 0
    num_verified: int = 0
    reads: list[_PostedRead] = field(default_factory=list)
    is_checking: bool = False  # whole, and its encoder is asked whether the ticket is one of its own
    failed: list[_PostedRead] = field(default_factory=list)  # to be posted once more

    @property
    def is_whole(self) -> bool:
        return self.num_verified == len(self.blocks)

    @property
    def has_begun(self) -> bool:
        return self.num_posted > 0

    def post(self, active: ActiveLink, max_reads: int, blocks_per_read: int) -> None:
        """As many reads as may be under way."""
        while self.failed and len(self.reads) < max_reads:
            again = self.failed.pop()
            self._post(active, again.first, again.end, is_second_try=True)
        while self.num_posted < len(self.blocks) and len(self.reads) < max_reads:
            end = min(self.num_posted + blocks_per_read, len(self.blocks))
            self._post(active, self.num_posted, end)
            self.num_posted = end

    def _post(self, active: ActiveLink, first: int, end: int, *, is_second_try: bool = False) -> None:
        read = BlockRead(self.ticket, 0, self.ticket.blocks[first:end], self.blocks[first:end])
        self.reads.append(_PostedRead(first, end, active.read(read), active.connector, is_second_try))

    def collect(self, note: Callable[[str, KvRelayError | None], None]) -> None:
        """Takes in the reads that have ended; `note` is told of each one's connector and how it ended.

        Raises what makes the item impossible to have from this ticket: StaleTicketError, or the second failure of a
        read.
        """
        for read in list(self.reads):
            state = read.transfer.poll()
            if not state.is_terminal:
                if read.transfer.error is not None:  # failed, and its destination is not free yet
                    raise read.transfer.error
                continue
            self.reads.remove(read)
            if state is TransferState.DONE:
                note(read.connector, None)
                self._verify(read)
                continue
            error = read.transfer.error or TransferError(f"the read ended as {state.value}")
            note(read.connector, error)
            if state is not TransferState.FAILED or read.is_second_try or not is_worth_another_try(error):
                raise error
            self.failed.append(read)

    def _verify(self, read: _PostedRead) -> None:
        """Compares the words that followed the data with the ticket's (PROTOCOL A6): all or nothing."""
        if not agree(read.transfer.words, self.ticket.words[read.first : read.end]):
            raise StaleTicketError(
                "the encoder reused the item's room before it was read", ticket_id=self.ticket.ticket_id
            )
        self.num_verified += read.end - read.first

    def destinations(self) -> list[tuple[str, Transfer, tuple[int, ...]]]:
        """Of the reads that are under way: connector, transfer and the blocks that it writes to."""
        return [(read.connector, read.transfer, self.blocks[read.first : read.end]) for read in self.reads]

    def idle_blocks(self) -> list[int]:
        """Ours that no read writes to."""
        busy = {block for _, _, blocks in self.destinations() for block in blocks}
        return [block for block in self.blocks if block not in busy]
