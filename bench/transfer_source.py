"""The source of `bench/transfer.py`: a process that owns a pool and serves it by one connector, without a ticket check.

One line of JSON each way per pool; the process ends with its stdin.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import ConfigError, KvRelayError
from kvrelay_core.request import AttemptId
from kvrelay_transfer.connectors.base import BlockRead, Connector, ConnectorOffer, PeerInfo, PeerLink
from kvrelay_transfer.connectors.registry import create_connectors
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import GroupBlocks, KvTicket, LeaseTerms

PERIOD = 251  # block i is filled with bytes i % PERIOD


class OpenGate:
    """Lets every read through."""

    def check_export(self, ticket: KvTicket, group: int, blocks: Sequence[int]) -> None:
        pass


class NoSocket:
    """The engine's side of the grpc connector needs one; it is not measured here."""

    def fetch(self, read_id: int, peer_id: str, read: BlockRead) -> None:
        raise NotImplementedError

    def abort_fetch(self, read_id: int) -> None:
        raise NotImplementedError

    def free_slot(self, slot: int) -> None:
        raise NotImplementedError


class Side:
    """A pool and one connector: what either process has. Raises ConfigError where the connector cannot work."""

    def __init__(self, name: str, layout: KvLayout, num_blocks: int, device: str, folder: Path) -> None:
        self._stack = ExitStack()
        self.memory = PoolMemory.allocate(layout, num_blocks, device, os.urandom(16))
        self._stack.callback(self.memory.close)
        try:
            self.connector = self._create(name, folder)
        except ImportError as error:
            self._stack.close()
            raise ConfigError(f"{name} is not installed: {error}") from error
        except KvRelayError:
            self._stack.close()
            raise

    def _create(self, name: str, folder: Path) -> Connector:
        slots = StagingSlots.create(1, slot_bytes_for(self.memory.layout))
        self._stack.callback(slots.close)
        staging = BlockStaging(self.memory, slots)
        self._stack.callback(staging.close)
        connectors = create_connectors(
            [name],
            memory=self.memory,
            run_dir=folder,
            worker_id=f"bench-{os.getpid()}",
            staging=staging,
            socket_half=NoSocket(),
            clock=MonotonicClock(),
        )
        [connector] = connectors.values()
        self._stack.callback(connector.close)
        return connector

    def fill(self) -> None:
        device = self.memory.tensor.device
        pattern = torch.arange(self.memory.num_blocks, device=device).remainder(PERIOD).to(torch.uint8)
        self.memory.block_rows.copy_(pattern[:, None].expand_as(self.memory.block_rows))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def connect(self, peer: PeerInfo) -> PeerLink:
        [offer] = peer.offers
        return self.connector.connect(peer, offer)

    def close(self) -> None:
        self._stack.close()


_ANSWER = "answer: "


class Source:
    """The parent's handle of the process."""

    def __init__(self, name: str, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvb-", dir="/tmp")
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, device, self._folder.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def open(self, layout: KvLayout, num_blocks: int) -> PeerInfo:
        """A new pool in place of the last one. Raises ConfigError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([msgspec.msgpack.encode(layout).hex(), num_blocks]), file=self._process.stdin, flush=True)
        line = next((line for line in self._process.stdout if line.startswith(_ANSWER)), None)  # UCX may talk as well
        if line is None:
            raise ConfigError(f"the source ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
        if "error" in answer:
            raise ConfigError(answer["error"])
        offer = ConnectorOffer(answer["name"], bytes.fromhex(answer["endpoint"]))
        return PeerInfo("bench", bytes.fromhex(answer["epoch"]), b"", layout, (offer,))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._folder.cleanup()


class Spans(Struct, frozen=True):
    """Scattered blocks of a source's pool and of the reader's, as many as there are bytes to move."""

    layout: KvLayout
    remote: tuple[int, ...]
    local: tuple[int, ...]

    def read(self, peer: PeerInfo, first: int = 0, end: int | None = None) -> BlockRead:
        """Of all blocks, or of those in [first, end), as one of several reads."""
        remote, local = self.remote[first:end], self.local[first:end]
        attempt = AttemptId("bench", "bench", 1)
        groups = (GroupBlocks(0, 0, remote, (0,) * len(remote)),)
        ticket = KvTicket(
            "bench", "bench", "bench", peer.engine_epoch, attempt, b"", self.layout, groups, 0, b"", LeaseTerms()
        )
        return BlockRead(ticket, 0, remote, local)


def serve(name: str, device: str, folder: Path) -> None:
    side: Side | None = None
    for line in sys.stdin:
        layout, num_blocks = json.loads(line)
        if side is not None:
            side.close()
        try:
            side = Side(name, msgspec.msgpack.decode(bytes.fromhex(layout), type=KvLayout), num_blocks, device, folder)
            side.fill()
            side.connector.serve(OpenGate())
            offer = side.connector.offer()
            assert offer is not None
            answer = {"epoch": side.memory.engine_epoch.hex(), "name": offer.name, "endpoint": offer.endpoint.hex()}
        except KvRelayError as error:
            side, answer = None, {"error": str(error)}
        print(_ANSWER + json.dumps(answer), flush=True)
    if side is not None:
        side.close()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
