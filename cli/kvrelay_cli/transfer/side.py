"""What each of the two processes has: a pool with a known content, and one connector by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from kvrelay_cli.transfer.byte_stream import NUM_SLOTS, StreamReader, StreamServer
from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import ConfigError
from kvrelay_transfer.connectors.base import Connector, PeerInfo, PeerLink
from kvrelay_transfer.connectors.grpc import GrpcConnector
from kvrelay_transfer.connectors.registry import create_connectors
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import Ticket

# Blocks are told apart by their numbers times this, and every four bytes of a block from the others by their place.
_BLOCK_STRIDE = 40503
_BLOCK_RANGE = 1 << 30
_COMPARED_BYTES = 16 << 20


class OpenGate:
    """Lets every read through."""

    def check_export(self, ticket: Ticket, group: int, blocks: Sequence[int]) -> None:
        pass


class Side:
    """A pool and one connector. Raises ConfigError where the connector cannot work."""

    def __init__(self, name: str, layout: KvLayout, num_blocks: int, device: str, folder: Path) -> None:
        self._stack = ExitStack()
        try:
            self.memory = PoolMemory.allocate(layout, num_blocks, device, os.urandom(16))
            self._stack.callback(self.memory.close)
            self.connector = self._create(name, folder)
        except ImportError as error:
            self._stack.close()
            raise ConfigError(f"{name} is not installed: {error}") from error
        except BaseException:
            self._stack.close()
            raise

    def _create(self, name: str, folder: Path) -> Connector:
        layout = self.memory.layout
        is_staged = name == GrpcConnector.name
        slot_bytes = slot_bytes_for(layout) if is_staged else layout.block_bytes
        self._slots = StagingSlots.create(NUM_SLOTS if is_staged else 1, slot_bytes)
        self._stack.callback(self._slots.close)
        self._staging = BlockStaging(self.memory, self._slots)
        self._stack.callback(self._staging.close)
        self._stream = StreamReader(self._slots)
        self._stack.callback(self._stream.close)
        connectors = create_connectors(
            [name],
            memory=self.memory,
            run_dir=folder,
            worker_id=f"bench-{os.getpid()}",
            staging=self._staging,
            socket_half=self._stream,
            clock=MonotonicClock(),
        )
        [connector] = connectors.values()
        self._stack.callback(connector.close)
        return connector

    def fill(self) -> None:
        """Every four bytes of the pool get a value of their own, and the words of odd blocks another generation."""
        positions = _positions(self.memory)
        for first in range(0, self.memory.num_blocks, step := _blocks_at_once(self.memory)):
            blocks = range(first, min(first + step, self.memory.num_blocks))
            _rows(self.memory)[first : blocks.stop] = _expected(self.memory, blocks, positions)
        for block in range(1, self.memory.num_blocks, 2):
            self.memory.words.bump(block)
        if self.memory.device == "cuda":
            torch.cuda.synchronize(self.memory.tensor.device)

    def holds(self, remote: Sequence[int], local: Sequence[int]) -> bool:
        """Whether each local block has the content that `fill` gave to its remote one."""
        rows, positions = _rows(self.memory), _positions(self.memory)
        for first in range(0, len(local), step := _blocks_at_once(self.memory)):
            arrived = rows[list(local[first : first + step])]
            if not torch.equal(arrived, _expected(self.memory, remote[first : first + step], positions)):
                return False
        return True

    def serve(self) -> PeerInfo:
        """Lets a reader in; what it needs to know."""
        self.connector.serve(OpenGate())
        peer_id = "bench"
        if isinstance(self.connector, GrpcConnector):
            server = StreamServer(self.memory, self._staging, self._slots)
            self._stack.callback(server.close)
            peer_id = server.address
        offer = self.connector.offer()
        assert offer is not None
        return PeerInfo(peer_id, self.memory.engine_epoch, b"", self.memory.layout, (offer,))

    def connect(self, peer: PeerInfo) -> PeerLink:
        [offer] = peer.offers
        return self.connector.connect(peer, offer)

    def progress(self) -> None:
        """To be called while a read is waited for: the grpc connector's blocks come in here."""
        if isinstance(self.connector, GrpcConnector):
            self._stream.deliver(self.connector)

    def close(self) -> None:
        self._stack.close()


def _rows(memory: PoolMemory) -> torch.Tensor:
    return memory.block_rows.view(torch.int32)


def _positions(memory: PoolMemory) -> torch.Tensor:
    return torch.arange(memory.layout.block_bytes // 4, dtype=torch.int32, device=memory.tensor.device)


def _expected(memory: PoolMemory, blocks: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
    """[len(blocks), block_bytes / 4]"""
    seeds = torch.tensor([block * _BLOCK_STRIDE % _BLOCK_RANGE for block in blocks], dtype=torch.int32)
    return seeds.to(memory.tensor.device)[:, None] + positions


def _blocks_at_once(memory: PoolMemory) -> int:
    return max(1, _COMPARED_BYTES // memory.layout.block_bytes)
