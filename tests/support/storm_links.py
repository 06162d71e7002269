"""The way from a source's pool to a reader's in the storm of hand-offs: what all have, the memory fabric and grpc.

`progress` lets something of what is under way happen, in an order that chance decides. Knows nothing of requests.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable

from handoff_sides import LAYOUT, SourceSide, make_memory

from kvrelay_core.clock import ManualClock
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.handoff_fetches import EmittedFetches
from kvrelay_engine.handoff_reader import HandoffReader
from kvrelay_engine.messages import Event, Export, Exported, Fetch, FetchAbort, FetchedPiece, FetchEnded, SlotFree
from kvrelay_transfer.connectors.base import Connector, ConnectorOffer
from kvrelay_transfer.connectors.grpc import GrpcConnector
from kvrelay_transfer.connectors.memory import MemoryConnector, MemoryFabric
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots

NUM_SLOTS = 4
BLOCKS_PER_PIECE = 2
LAND_CHANCE = 0.4
LATE_CHANCE = 0.05


class StormLink(ABC):
    """The reader's pool and its one connector; `between` is called after data was copied and before the words are
    read, where the connector lets a test in there."""

    between: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, clock: ManualClock, num_blocks: int, emit: Callable[[Event], None]) -> None:
        self.clock = clock
        self.emit = emit
        self.memory = make_memory(num_blocks)
        self.pool = BlockPool(num_blocks, self.memory.words)
        self.connector = self.make_connector()

    @abstractmethod
    def make_connector(self) -> Connector: ...

    @abstractmethod
    def offer_of(self, side: SourceSide) -> ConnectorOffer:
        """Of a source that has just started; one that it replaces is dead from now on."""

    @abstractmethod
    def progress(self, reader: HandoffReader, chance: random.Random) -> None: ...

    def take(self, event: Event) -> None:  # noqa: B027 - most have no service
        """What the reader's engine emitted for its service."""

    def written_blocks(self) -> list[int]:
        """Ours that reads under way may still write to, where the connector can tell."""
        return []

    def close(self) -> None:
        self.connector.close()
        self.memory.close()


class MemoryLink(StormLink):
    def make_connector(self) -> Connector:
        self._fabric = MemoryFabric()
        return MemoryConnector(self._fabric, self.memory, self.clock)

    def offer_of(self, side: SourceSide) -> ConnectorOffer:
        return MemoryConnector(self._fabric, side.memory, self.clock).offer()

    def progress(self, reader: HandoffReader, chance: random.Random) -> None:
        """What was given up lands late: others may have its destination by then, if they were allowed to."""
        for transfer in list(self._fabric.pending):
            if chance.random() > (LATE_CHANCE if transfer.was_aborted else LAND_CHANCE):
                continue
            transfer.copy_data()
            self.between()
            transfer.read_words()

    def written_blocks(self) -> list[int]:
        return [block for read in self._fabric.pending for block in read.request.local_blocks]


class GrpcLink(StormLink):
    """Plays both services of the byte stream, piece by piece."""

    def make_connector(self) -> Connector:
        self._side: SourceSide | None = None
        self._slots = StagingSlots.create(NUM_SLOTS, slot_bytes_for(LAYOUT))
        self._staging = BlockStaging(self.memory, self._slots)
        self._free = list(range(NUM_SLOTS))
        self._pieces: list[tuple[Fetch, int]] = []  # first block of each that is still to come
        return GrpcConnector(self.memory.num_blocks, self._staging, EmittedFetches(self.emit), self.clock)

    def offer_of(self, side: SourceSide) -> ConnectorOffer:
        self._side = side
        return ConnectorOffer("grpc", b"")

    def take(self, event: Event) -> None:
        match event:
            case Fetch():
                self._pieces += [(event, first) for first in range(0, len(event.blocks), BLOCKS_PER_PIECE)]
            case FetchAbort(read):
                self._pieces = [piece for piece in self._pieces if piece[0].read != read]
            case SlotFree(slot):
                self._free.append(slot)

    def progress(self, reader: HandoffReader, chance: random.Random) -> None:
        if not self._pieces or not self._free:
            return
        fetch, first = self._pieces.pop(chance.randrange(len(self._pieces)))
        exported = self._export(fetch, fetch.blocks[first : first + BLOCKS_PER_PIECE])
        if exported.error is None:
            slot = self._free.pop()
            with self._source.slots.slot(0) as sent, self._slots.slot(slot) as received:
                received[:] = sent
            reader.handle(FetchedPiece(fetch.read, first, slot, exported.words))
        elif any(left.read == fetch.read for left, _ in self._pieces):
            self._pieces = [piece for piece in self._pieces if piece[0].read != fetch.read]
        if exported.error is not None or not any(left.read == fetch.read for left, _ in self._pieces):
            reader.handle(FetchEnded(fetch.read, exported.error))

    @property
    def _source(self) -> SourceSide:
        assert self._side is not None
        return self._side

    def _export(self, fetch: Fetch, blocks: tuple[int, ...]) -> Exported:
        waiting = self._source.take_events()
        copy_out = self._source.staging.copy_out

        def copy_and_act(blocks: tuple[int, ...], slot: int) -> None:
            copy_out(blocks, slot)
            self.between()

        self._source.staging.copy_out = copy_and_act  # type: ignore[method-assign]
        self._source.source.handle(Export(1, fetch.ticket, fetch.group, blocks, 0))
        self._source.staging.copy_out = copy_out  # type: ignore[method-assign]
        exported = self._source.events.pop()
        assert isinstance(exported, Exported)
        self._source.events[:0] = waiting
        return exported

    def close(self) -> None:
        super().close()
        assert sorted(self._free) == list(range(NUM_SLOTS)), "a staging slot was not given back"
        self._staging.close()
        self._slots.close()
