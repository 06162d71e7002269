"""A source and a reader with two connectors in common, over the memory fabric: `first` is preferred to `second`."""

from __future__ import annotations

from handoff_pair import TOKENS, HandoffPair
from handoff_sides import ADDRESS, SourceSide, make_sequence

from kvrelay_core.errors import LeaseExpiredError, StaleTicketError, TransferError
from kvrelay_transfer.connectors.base import Connector, ConnectorOffer, TransferState
from kvrelay_transfer.connectors.memory import MemoryConnector


class Way(MemoryConnector):
    """The memory connector under another name."""

    def named(self, name: str) -> Way:
        self.name = name
        return self

    def offer(self) -> ConnectorOffer:
        return ConnectorOffer(self.name, super().offer().endpoint)


class TwoWays(HandoffPair):
    """Both sides have `first` and `second`, in this order."""

    def __init__(self) -> None:
        super().__init__(is_connected=False)
        self.mine: dict[str, Connector] = {
            name: Way(self.fabric, self.memory, self.clock).named(name) for name in ("first", "second")
        }
        self.reader.peers._connectors = self.mine
        self.connect_again()

    def connect_again(self) -> None:
        theirs = [Way(self.fabric, self.side.memory, self.clock).named(name) for name in ("first", "second")]
        self.reader.peers.connect(self.side.peer(*(connector.offer() for connector in theirs)))

    def restart_source(self) -> None:
        self.side.close()
        self.side = SourceSide(self.clock)
        self.connect_again()

    @property
    def way(self) -> str:
        active = self.reader.peers.find(ADDRESS, self.side.memory.engine_epoch)
        assert active is not None
        return active.connector

    def begin(self, request_id: int = 1) -> None:
        """Follows a finished ticket, up to its posted reads."""
        sequence = make_sequence([request_id, *TOKENS], request_id)
        self.open(sequence, self.side.prefill(sequence))
        self.carry(request_id)
        assert self.poll() is None and self.fabric.pending

    def fail_reads(self, error: TransferError | StaleTicketError | LeaseExpiredError) -> None:
        for transfer in list(self.fabric.pending):
            transfer.end(TransferState.FAILED, error)


def fail(ways: TwoWays, count: int, error: type[TransferError] = TransferError) -> None:
    for _ in range(count):
        ways.reader.peers.note_read(ADDRESS, ways.way, error("it broke"))
