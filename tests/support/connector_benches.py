"""One test bench per connector: a source, a reader's pool, a link, and the power to stop a read half-way.

The contract suite sees only `ConnectorBench`. How a read is held up differs: the memory fabric waits for us by
nature, the shm copy thread is stopped in the clock that it looks at between spans, and the grpc connector waits
for the pump, which plays both service processes.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from handoff_sides import ADDRESS, LAYOUT, MODEL, SourceSide, make_memory, make_sequence, wait_until

from kvrelay_core.clock import ManualClock
from kvrelay_core.error_info import error_of
from kvrelay_engine.messages import Export, Exported
from kvrelay_transfer.connectors.base import BlockRead, Connector, ConnectorOffer, PeerInfo, PeerLink, Transfer
from kvrelay_transfer.connectors.grpc import GrpcConnector
from kvrelay_transfer.connectors.memory import MemoryConnector, MemoryFabric
from kvrelay_transfer.connectors.shm import ShmConnector
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import KvTicket

NUM_TOKENS = 60  # 15 blocks


@dataclass(frozen=True)
class Shapes:
    """Of the source's pool and the reader's; `memory` is the reader's, where several benches share it."""

    source: KvLayout = LAYOUT
    reader: KvLayout = LAYOUT
    num_tokens: int = NUM_TOKENS
    memory: PoolMemory | None = None


class ConnectorBench(ABC):
    """The source has one finished ticket, of 15 blocks if nothing is said; the reader's pool is empty."""

    deadline_s = 5.0
    device = "cpu"
    can_recall = True  # a posted copy that has not begun can still be prevented

    def __init__(self, shapes: Shapes) -> None:
        self.clock = ManualClock()
        self.shapes = shapes
        self.side = self.make_side()
        self.ticket: KvTicket = self.make_ticket()
        self.memory: PoolMemory = shapes.memory or make_memory(40, shapes.reader, self.device)
        self.connector: Connector = self.make_connector()
        self.offer: ConnectorOffer = self.make_offer()
        self.link: PeerLink = self.connector.connect(self.side.peer(self.offer), self.offer)

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.ticket.groups[0].blocks

    def words_of(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """As the ticket has them."""
        group = self.ticket.groups[0]
        return tuple(group.words[group.blocks.index(block)] for block in blocks)

    def peer(self, epoch: bytes) -> PeerInfo:
        return PeerInfo(ADDRESS, epoch, MODEL, self.shapes.source, (self.offer,))

    def request(self, remote: tuple[int, ...], local: tuple[int, ...]) -> BlockRead:
        return BlockRead(self.ticket, 0, remote, local)

    def make_side(self) -> SourceSide:
        return SourceSide(self.clock, layout=self.shapes.source)

    def make_ticket(self) -> KvTicket:
        tokens = list(range(self.shapes.num_tokens))
        return self.side.prefill(make_sequence(tokens, layout=self.shapes.source))

    @abstractmethod
    def make_connector(self) -> Connector: ...

    @abstractmethod
    def make_offer(self) -> ConnectorOffer: ...

    @abstractmethod
    def finish(self, *transfers: Transfer) -> None:
        """Drives the transfers until they are terminal."""

    @abstractmethod
    def read_interrupted(self, read: BlockRead, act: Callable[[], None]) -> Transfer:
        """A read during which, data being copied in part or whole and the words not yet read, `act` happens."""

    @abstractmethod
    def stall(self) -> None:
        """Reads posted from now on make no progress."""

    @abstractmethod
    def resume(self) -> None: ...

    def close(self) -> None:
        self.link.close()
        self.connector.close()
        self.side.close()
        if self.shapes.memory is None:  # else it belongs to whoever shares it
            self.memory.close()


class MemoryBench(ConnectorBench):
    def make_connector(self) -> Connector:
        self.fabric = MemoryFabric()
        self.is_stalled = False
        self.source_connector = MemoryConnector(self.fabric, self.side.memory, self.clock)
        return MemoryConnector(self.fabric, self.memory, self.clock, self.deadline_s)

    def make_offer(self) -> ConnectorOffer:
        return self.source_connector.offer()

    def finish(self, *transfers: Transfer) -> None:
        if not self.is_stalled:
            self.fabric.land_all()
        assert all(transfer.poll().is_terminal for transfer in transfers)

    def read_interrupted(self, read: BlockRead, act: Callable[[], None]) -> Transfer:
        transfer = self.link.read(read)
        self.fabric.pending[-1].copy_data()
        act()
        self.fabric.pending[-1].read_words()
        return transfer

    def stall(self) -> None:
        self.is_stalled = True

    def resume(self) -> None:
        self.is_stalled = False


class GatedClock(ManualClock):
    """A clock at which another thread can be stopped, or given something to do, when it looks."""

    def __init__(self, stopped_thread: str) -> None:
        super().__init__()
        self._stopped_thread = stopped_thread
        self.gate = threading.Event()
        self.gate.set()
        self.on_look: Callable[[int], None] | None = None
        self._looks = 0

    def now(self) -> float:
        if threading.current_thread().name == self._stopped_thread:
            assert self.gate.wait(timeout=20.0)
            self._looks += 1
            if self.on_look is not None:
                self.on_look(self._looks)
        return super().now()

    def watch(self, on_look: Callable[[int], None]) -> None:
        self._looks = 0
        self.on_look = on_look


class ShmBench(ConnectorBench):
    def __init__(self, directory: Path, shapes: Shapes) -> None:
        self._directory = directory
        super().__init__(shapes)

    def make_connector(self) -> Connector:
        self.gated = GatedClock("shm-copy")
        self.source_connector = ShmConnector(self.side.memory, self.clock, self._directory / "source.sock")
        self.clock = self.gated
        return ShmConnector(self.memory, self.gated, None, self.deadline_s)

    def make_offer(self) -> ConnectorOffer:
        offer = self.source_connector.offer()
        assert offer is not None
        return offer

    def finish(self, *transfers: Transfer) -> None:
        wait_until(lambda: all(transfer.poll().is_terminal for transfer in transfers))

    def read_interrupted(self, read: BlockRead, act: Callable[[], None]) -> Transfer:
        """The blocks are to be scattered: acts before the last span is copied."""
        self.gated.watch(lambda look: act() if look == len(read.remote_blocks) else None)
        transfer = self.link.read(read)
        self.finish(transfer)
        self.gated.on_look = None
        return transfer

    def stall(self) -> None:
        self.gated.gate.clear()

    def resume(self) -> None:
        self.gated.gate.set()

    def close(self) -> None:
        self.resume()
        super().close()
        self.source_connector.close()


class Pump:
    """Both service processes of a Fetch: asks the source for exports, moves slots, delivers pieces."""

    def __init__(self, side: SourceSide, slots: StagingSlots, blocks_per_slot: int) -> None:
        self._side = side
        self._slots = slots
        self.free_slots = list(range(slots.num_slots))
        self._blocks_per_slot = blocks_per_slot
        self.requests: list[tuple[int, BlockRead]] = []
        self.aborted: list[int] = []
        self.before_words: Callable[[], None] | None = None

    # SocketHalf, towards the connector.

    def fetch(self, read_id: int, peer_id: str, read: BlockRead) -> None:
        assert peer_id == ADDRESS
        self.requests.append((read_id, read))

    def abort_fetch(self, read_id: int) -> None:
        self.aborted.append(read_id)

    def free_slot(self, slot: int) -> None:
        self.free_slots.append(slot)

    # The work between the sockets.

    def run(self, connector: GrpcConnector) -> None:
        while self.requests:
            read_id, read = self.requests.pop(0)
            for first in range(0, len(read.remote_blocks), self._blocks_per_slot):
                exported = self._export(read, first)
                if exported.error is not None:
                    connector.end(read_id, error_of(exported.error))
                    break
                slot = self.free_slots.pop()
                with self._side.slots.slot(0) as sent, self._slots.slot(slot) as received:
                    received[:] = sent
                connector.deliver(read_id, first, slot, exported.words)
            else:
                connector.end(read_id, None)

    def _export(self, read: BlockRead, first: int) -> Exported:
        blocks = read.remote_blocks[first : first + self._blocks_per_slot]
        if self.before_words is not None:
            self._side.staging.copy_out(blocks, 0)
            self.before_words()
            return Exported(1, tuple(self._side.memory.words.read(block) for block in blocks))
        self._side.take_events()
        self._side.source.handle(Export(1, read.ticket, read.group, blocks, 0))
        (exported,) = self._side.take_events()
        assert isinstance(exported, Exported)
        return exported


class GrpcBench(ConnectorBench):
    def make_connector(self) -> Connector:
        blocks_per_slot = 4
        slot_bytes = slot_bytes_for(self.memory.layout)
        self.slots = StagingSlots.create(2, slot_bytes)
        self.staging = BlockStaging(self.memory, self.slots)
        self.pump = Pump(self.side, self.slots, blocks_per_slot)
        self.is_stalled = False
        self.grpc = GrpcConnector(self.memory.num_blocks, self.staging, self.pump, self.clock, self.deadline_s)
        return self.grpc

    def make_offer(self) -> ConnectorOffer:
        return self.grpc.offer()

    def finish(self, *transfers: Transfer) -> None:
        if not self.is_stalled:
            self.pump.run(self.grpc)
        assert all(transfer.poll().is_terminal for transfer in transfers)

    def read_interrupted(self, read: BlockRead, act: Callable[[], None]) -> Transfer:
        transfer = self.link.read(read)
        self.pump.before_words = act
        self.finish(transfer)
        self.pump.before_words = None
        return transfer

    def stall(self) -> None:
        self.is_stalled = True

    def resume(self) -> None:
        self.is_stalled = False

    def close(self) -> None:
        super().close()
        assert len(self.pump.free_slots) == self.slots.num_slots, "a staging slot was not given back"
        self.staging.close()
        self.slots.close()


def make_bench(name: str, directory: Path, shapes: Shapes | None = None) -> ConnectorBench:
    shapes = shapes or Shapes()
    match name:
        case "memory":
            return MemoryBench(shapes)
        case "shm":
            return ShmBench(directory, shapes)
        case "grpc":
            return GrpcBench(shapes)
        case "nixl":
            from nixl_bench import NixlBench  # whose base class is above

            return NixlBench(shapes)
    raise AssertionError(name)
