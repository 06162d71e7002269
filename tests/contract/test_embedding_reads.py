"""Embeddings read from an encoder's pool over each connector: the rows arrive, and the words tell what is stale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from connector_benches import GatedClock
from encoder_rig import LAYOUT, EncoderRig, rows_of
from handoff_sides import wait_until

from kvrelay_core.clock import ManualClock
from kvrelay_core.error_info import error_of
from kvrelay_core.errors import TransferError
from kvrelay_engine import messages
from kvrelay_transfer.connectors.base import BlockRead, Connector, PeerLink, Transfer, TransferState
from kvrelay_transfer.connectors.grpc import GrpcConnector
from kvrelay_transfer.connectors.memory import MemoryConnector, MemoryFabric
from kvrelay_transfer.connectors.shm import ShmConnector
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import EmbeddingTicket

PICTURE = bytes(range(1, 43))  # 42 tokens in 11 blocks of 4
LOCAL = tuple(range(22, 0, -2))  # where its blocks go


class EmbeddingBench(ABC):
    """An encoder with one item under a ticket, and a reader's empty pool of the same layout."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fabric = MemoryFabric()
        self.rig = EncoderRig(fabric=self.fabric)
        self.ticket: EmbeddingTicket = self.rig.encode(PICTURE)
        self.memory = PoolMemory.allocate(LAYOUT, 30, "cpu", b"reader epoch....")
        self.link: PeerLink = self.connect()

    @abstractmethod
    def connect(self) -> PeerLink: ...

    @abstractmethod
    def finish(self, transfer: Transfer) -> None: ...

    @abstractmethod
    def read_interrupted(self, act: Callable[[], None]) -> Transfer:
        """A read of the item during which, before the words are read, `act` happens."""

    def request(self, ticket: EmbeddingTicket | None = None) -> BlockRead:
        ticket = ticket or self.ticket
        return BlockRead(ticket, 0, ticket.blocks, LOCAL)

    def read(self) -> Transfer:
        transfer = self.link.read(self.request())
        self.finish(transfer)
        return transfer

    def close(self) -> None:
        self.link.close()
        self.rig.close()
        self.memory.close()


class MemoryBench(EmbeddingBench):
    def connect(self) -> PeerLink:
        self.connector = MemoryConnector(self.fabric, self.memory, self.rig.clock)
        return self.connector.connect(self.rig.peer(), self.rig.connector.offer())

    def finish(self, transfer: Transfer) -> None:
        self.fabric.land_all()
        assert transfer.poll().is_terminal

    def read_interrupted(self, act: Callable[[], None]) -> Transfer:
        transfer = self.link.read(self.request())
        self.fabric.pending[-1].copy_data()
        act()
        self.fabric.pending[-1].read_words()
        return transfer


class ShmBench(EmbeddingBench):
    def connect(self) -> PeerLink:
        self.gated = GatedClock("shm-copy")
        self.serving = ShmConnector(self.rig.memory, ManualClock(), self.directory / "pool.sock")
        self.connector: Connector = ShmConnector(self.memory, self.gated, None)
        offer = self.serving.offer()
        assert offer is not None
        return self.connector.connect(self.rig.peer(self.serving), offer)

    def finish(self, transfer: Transfer) -> None:
        wait_until(lambda: transfer.poll().is_terminal)

    def read_interrupted(self, act: Callable[[], None]) -> Transfer:
        self.gated.watch(lambda look: act() if look == len(LOCAL) else None)
        transfer = self.read()
        self.gated.on_look = None
        return transfer

    def close(self) -> None:
        super().close()
        self.connector.close()
        self.serving.close()


class GrpcBench(EmbeddingBench):
    """The bench is both service processes: exports at the encoder, pieces to the reader."""

    def connect(self) -> PeerLink:
        self.slots = StagingSlots.create(1, self.rig.slots.slot_bytes)
        self.staging = BlockStaging(self.memory, self.slots)
        self.asked: list[tuple[int, BlockRead]] = []
        self.before_words: Callable[[], None] | None = None
        self.connector = GrpcConnector(self.memory.num_blocks, self.staging, self, self.rig.clock)
        return self.connector.connect(self.rig.peer(self.connector), self.connector.offer())

    def fetch(self, read_id: int, peer_id: str, read: BlockRead) -> None:
        self.asked.append((read_id, read))

    def abort_fetch(self, read_id: int) -> None: ...

    def free_slot(self, slot: int) -> None: ...

    def finish(self, transfer: Transfer) -> None:
        read_id, read = self.asked.pop()
        for first in range(0, len(read.remote_blocks), 4):
            blocks = read.remote_blocks[first : first + 4]
            exported = self._export(read, blocks)
            if exported.error is not None:
                self.connector.end(read_id, error_of(exported.error))
                return
            with self.rig.slots.slot(0) as sent, self.slots.slot(0) as received:
                received[:] = sent
            self.connector.deliver(read_id, first, 0, exported.words)
        self.connector.end(read_id, None)

    def _export(self, read: BlockRead, blocks: tuple[int, ...]) -> messages.Exported:
        if self.before_words is not None:
            self.rig.staging.copy_out(blocks, 0)
            self.before_words()
            self.before_words = None
            return messages.Exported(1, tuple(map(self.rig.memory.words.read, blocks)))
        self.rig.engine.handle(messages.Export(1, read.ticket, read.group, blocks, 0))
        exported = self.rig.events.pop()
        assert isinstance(exported, messages.Exported)
        return exported

    def read_interrupted(self, act: Callable[[], None]) -> Transfer:
        self.before_words = act
        return self.read()

    def close(self) -> None:
        super().close()
        self.staging.close()
        self.slots.close()


BENCHES: dict[str, Callable[[Path], EmbeddingBench]] = {"memory": MemoryBench, "shm": ShmBench, "grpc": GrpcBench}


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddingBench]:
    bench = BENCHES[request.param](tmp_path)
    yield bench
    bench.close()


def test_rows_and_words_arrive(bench: EmbeddingBench) -> None:
    transfer = bench.read()
    assert transfer.poll() is TransferState.DONE and transfer.error is None
    rows = bench.memory.tensor[list(LOCAL)].flatten(0, 1)[: bench.ticket.num_tokens]
    assert torch.equal(rows, rows_of(PICTURE))
    assert tuple(transfer.words) == bench.ticket.words


def test_an_item_evicted_before_the_read_shows_in_its_words(bench: EmbeddingBench) -> None:
    assert bench.rig.release(bench.ticket)
    for number in range(1, 4):  # as much as the pool holds
        bench.rig.release(bench.rig.encode(bytes([number]) * 52, number))
    transfer = bench.read()
    assert transfer.poll() is TransferState.DONE
    assert all(now != before for now, before in zip(transfer.words, bench.ticket.words, strict=True))


def test_an_item_that_is_released_but_still_here_can_be_read(bench: EmbeddingBench) -> None:
    assert bench.rig.release(bench.ticket)
    assert tuple(bench.read().words) == bench.ticket.words


def test_a_block_reused_during_the_read_shows_in_its_word(bench: EmbeddingBench) -> None:
    reused = bench.ticket.blocks[0]
    before = bench.rig.memory.block_rows[reused].clone()
    transfer = bench.read_interrupted(lambda: bench.rig.overwrite(reused))
    assert transfer.poll() is TransferState.DONE
    assert torch.equal(bench.memory.block_rows[LOCAL[0]], before), "the copy came before the reuse"
    assert transfer.words[0] != bench.ticket.words[0] and tuple(transfer.words[1:]) == bench.ticket.words[1:]
    with pytest.raises(AssertionError, match="reused"):
        bench.rig.engine.check_integrity()
    bench.rig.release(bench.ticket)
    for number in range(1, 4):
        bench.rig.release(bench.rig.encode(bytes([number]) * 52, number))


def test_closing_the_link_ends_a_read(bench: EmbeddingBench) -> None:
    bench.link.close()
    transfer = bench.link.read(bench.request())
    assert transfer.poll() is TransferState.TORN_DOWN and isinstance(transfer.error, TransferError)
