"""The shm connector against a source in a process of its own, that ends, is killed, or is started again."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from connector_benches import ConnectorBench, Shapes, ShmBench, make_bench
from handoff_sides import ADDRESS, MODEL, make_memory, wait_until

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.base import BlockRead, ConnectorOffer, PeerInfo, TransferState
from kvrelay_transfer.connectors.shm import ShmConnector
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory

OWNER = Path(__file__).parent.parent / "support" / "pool_owner.py"
OWNER_BLOCKS, OWNER_FLOATS = 64, 4096
OWNER_LAYOUT = KvLayout("float32", 1, 1, 4, OWNER_FLOATS // 8, hash_unit_tokens=8)


class OwnerProcess:
    def __init__(self, socket_path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(OWNER), str(socket_path), str(OWNER_BLOCKS), str(OWNER_FLOATS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = json.loads(self._read_line())
        self.words = tuple(ready["words"])
        self.offer = ConnectorOffer("shm", bytes.fromhex(ready["endpoint"]))
        self.peer = PeerInfo(ADDRESS, bytes.fromhex(ready["epoch"]), MODEL, OWNER_LAYOUT, (self.offer,))

    def bump(self, block: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"bump {block}\n")
        self.process.stdin.flush()
        assert self._read_line() == "done\n"

    def end(self, *, kill: bool) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if kill:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()

    def _read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture
def reader() -> Iterator[tuple[PoolMemory, ShmConnector]]:
    memory = make_memory(OWNER_BLOCKS, OWNER_LAYOUT)
    connector = ShmConnector(memory, MonotonicClock(), None)
    yield memory, connector
    connector.close()
    memory.close()


def read_all(memory: PoolMemory, connector: ShmConnector, owner: OwnerProcess, ticket_of: ConnectorBench) -> None:
    """Reads the whole pool of the owner, which holds i in block i."""
    link = connector.connect(owner.peer, owner.offer)
    blocks = tuple(range(1, OWNER_BLOCKS))
    transfer = link.read(BlockRead(ticket_of.ticket, 0, blocks, tuple(reversed(blocks))))
    wait_until(lambda: transfer.poll().is_terminal)
    assert transfer.poll() is TransferState.DONE
    assert transfer.words == owner.words[1:]
    expected = torch.arange(OWNER_BLOCKS - 1, 0, -1, dtype=torch.float32)
    assert torch.equal(memory.tensor[1:].flatten(1), expected[:, None].expand(-1, OWNER_FLOATS))
    link.close()


@pytest.fixture
def any_ticket(tmp_path: Path) -> Iterator[ConnectorBench]:
    bench = make_bench("memory", tmp_path)
    yield bench
    bench.close()


def test_a_pool_of_another_process_is_read(
    tmp_path: Path, reader: tuple[PoolMemory, ShmConnector], any_ticket: ConnectorBench
) -> None:
    memory, connector = reader
    owner = OwnerProcess(tmp_path / "pool.sock")
    read_all(memory, connector, owner, any_ticket)

    link = connector.connect(owner.peer, owner.offer)
    owner.bump(7)
    transfer = link.read(BlockRead(any_ticket.ticket, 0, (6, 7, 8), (1, 2, 3)))
    wait_until(lambda: transfer.poll().is_terminal)
    assert transfer.words == (owner.words[6], owner.words[7] + 1, owner.words[8])
    owner.end(kill=False)
    assert list(tmp_path.iterdir()) == [], "an owner that ends takes its socket file along"


def test_a_killed_source_leaves_a_readable_mapping_and_a_socket_file(
    tmp_path: Path, reader: tuple[PoolMemory, ShmConnector], any_ticket: ConnectorBench
) -> None:
    memory, connector = reader
    gc.collect()  # the segments of earlier tests go now, not while we count
    before = len(os.listdir("/proc/self/fd"))
    owner = OwnerProcess(tmp_path / "pool.sock")
    read_all(memory, connector, owner, any_ticket)
    link = connector.connect(owner.peer, owner.offer)
    owner.end(kill=True)

    memory.tensor.zero_()
    transfer = link.read(BlockRead(any_ticket.ticket, 0, (3, 5), (1, 2)))
    wait_until(lambda: transfer.poll().is_terminal)
    assert transfer.poll() is TransferState.DONE
    assert bool((memory.tensor[1] == 3.0).all()) and bool((memory.tensor[2] == 5.0).all())
    with pytest.raises(TransferError):
        connector.connect(owner.peer, owner.offer)

    link.close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)
    assert [path.name for path in tmp_path.iterdir()] == ["pool.sock"]


def test_the_next_start_replaces_the_socket_and_refuses_the_old_epoch(
    tmp_path: Path, reader: tuple[PoolMemory, ShmConnector], any_ticket: ConnectorBench
) -> None:
    memory, connector = reader
    killed = OwnerProcess(tmp_path / "pool.sock")
    killed.end(kill=True)
    restarted = OwnerProcess(tmp_path / "pool.sock")
    with pytest.raises(TransferError, match="another engine start"):
        connector.connect(killed.peer, killed.offer)
    read_all(memory, connector, restarted, any_ticket)
    restarted.end(kill=False)


def test_a_mapping_outlives_the_copy_out_of_it(tmp_path: Path) -> None:
    """Else the process would end where the copy goes on."""
    bench = ShmBench(tmp_path, Shapes())
    link: Any = bench.link
    mapping = link.region._mapping
    bench.stall()
    transfer = bench.link.read(bench.request(bench.blocks[:3], (1, 2, 3)))
    bench.link.close()
    assert not mapping.closed
    bench.resume()
    bench.finish(transfer)
    assert transfer.poll() is TransferState.TORN_DOWN
    wait_until(lambda: mapping.closed)
    bench.close()
