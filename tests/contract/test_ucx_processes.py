"""The ucx connector between processes, one of which is killed, stopped, or started again.

Over shared memory and over TCP, which notice a dead peer in ways of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from handoff_sides import ADDRESS, MODEL, SourceSide, fill_block, make_memory, make_sequence, wait_until
from msgspec.structs import replace
from ucx_bench import OVER_TCP
from ucx_owner import CHUNK_BYTES, LAYOUT, NUM_BLOCKS, TICKET_BLOCKS

from kvrelay_core.clock import ManualClock, MonotonicClock
from kvrelay_core.errors import DeadlineError, TicketRejectedError, TransferError
from kvrelay_transfer.connectors import ucx_chunks
from kvrelay_transfer.connectors.base import BlockRead, ConnectorOffer, PeerInfo, PeerLink, Transfer, TransferState
from kvrelay_transfer.connectors.ucx import UcxConnector
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.ticket import KvTicket

SUPPORT = Path(__file__).parent.parent / "support"
NOTICED_S = 1.0
DEADLINE_S = 5.0


class Child:
    """Its first line is `ready`."""

    def __init__(self, script: str, arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / script), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])},
        )
        self.ready = self.read_line()

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> str:
        self.tell(command)
        return self.read_line()

    def end(self, *, kill: bool) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if kill:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()


class Owner(Child):
    def __init__(self, options: dict[str, str]) -> None:
        super().__init__("ucx_owner.py", options)
        started = json.loads(self.ready)
        self.offer = ConnectorOffer("ucx", bytes.fromhex(started["endpoint"]))
        self.peer = PeerInfo(ADDRESS, bytes.fromhex(started["epoch"]), MODEL, LAYOUT, (self.offer,))
        self.ticket = msgspec.msgpack.decode(bytes.fromhex(started["ticket"]), type=KvTicket)

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.ticket.groups[0].blocks

    def read_all(self) -> BlockRead:
        return BlockRead(self.ticket, 0, self.blocks, tuple(range(TICKET_BLOCKS, 0, -1)))


class Reader:
    def __init__(self, options: dict[str, str]) -> None:
        self.clock = ManualClock()
        self.memory: PoolMemory = make_memory(NUM_BLOCKS, LAYOUT)
        self.connector = UcxConnector(self.memory, self.clock, DEADLINE_S, options)

    def connect(self, owner: Owner) -> PeerLink:
        link = self.connector.connect(owner.peer, owner.offer)
        wait_until(lambda: link.probed_gb_per_s() is not None)
        return link

    def close(self) -> None:
        wait_until(lambda: self.connector.reader.num_chunks_taken == 0)
        self.connector.close()
        self.memory.close()


@pytest.fixture(scope="module", params=[{}, pytest.param(OVER_TCP, marks=pytest.mark.full)], ids=["shm", "tcp"])
def options(request: pytest.FixtureRequest) -> dict[str, str]:
    chosen: dict[str, str] = request.param
    return chosen


@pytest.fixture(scope="module")
def owner(options: dict[str, str]) -> Iterator[Owner]:
    """One that lives on, for the tests that do not kill it."""
    owner = Owner(options)
    yield owner
    owner.end(kill=False)


@pytest.fixture
def doomed(options: dict[str, str]) -> Iterator[Owner]:
    owner = Owner(options)
    yield owner
    owner.end(kill=True)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ucx_chunks.CHUNK_BYTES, "cpu", CHUNK_BYTES)


@pytest.fixture
def reader(options: dict[str, str]) -> Iterator[Reader]:
    reader = Reader(options)
    yield reader
    reader.close()


def finish(transfer: Transfer) -> TransferState:
    wait_until(lambda: transfer.poll().is_terminal)
    return transfer.poll()


def check_contents(reader: Reader, owner: Owner, transfer: Transfer) -> None:
    """`fill_block` of the owner, done again here."""
    assert finish(transfer) is TransferState.DONE, transfer.error
    assert tuple(transfer.words) == owner.ticket.groups[0].words
    expected = make_memory(NUM_BLOCKS, LAYOUT)
    for local, remote in zip(owner.read_all().local_blocks, owner.blocks, strict=True):
        fill_block(expected, local, seed=1000 + remote)
    assert torch.equal(expected.block_rows, reader.memory.block_rows)
    expected.close()


def test_a_read_is_bit_equal_and_a_forged_ticket_is_refused(owner: Owner, reader: Reader) -> None:
    link = reader.connect(owner)
    forged = replace(owner.ticket, mac=bytes(32))
    transfer = link.read(BlockRead(forged, 0, owner.read_all().remote, owner.read_all().local))
    assert finish(transfer) is TransferState.FAILED
    assert isinstance(transfer.error, TicketRejectedError)
    assert not reader.memory.block_rows.any()
    check_contents(reader, owner, link.read(owner.read_all()))


def test_a_source_that_is_killed_ends_reads_and_takes_nothing_back(doomed: Owner, owner: Owner, reader: Reader) -> None:
    """Killed after one read, during the next, and before a third; then its next start is read."""
    link = reader.connect(doomed)
    check_contents(reader, doomed, link.read(doomed.read_all()))
    assert doomed.ask("hold 3") == "ready"
    during = link.read(doomed.read_all())
    assert doomed.read_line() == "held"
    assert during.poll() is TransferState.PENDING
    doomed.process.kill()
    killed_s = time.monotonic()
    assert finish(during) in (TransferState.FAILED, TransferState.TORN_DOWN)
    assert time.monotonic() - killed_s < NOTICED_S
    assert isinstance(during.error, TransferError)

    begun_s = time.monotonic()
    after = link.read(doomed.read_all())
    assert finish(after) in (TransferState.FAILED, TransferState.TORN_DOWN)
    assert time.monotonic() - begun_s < NOTICED_S
    assert isinstance(after.error, TransferError)
    link.close()

    with pytest.raises(TransferError, match="another engine start"):
        reader.connector.connect(owner.peer, doomed.offer)
    next_link = reader.connect(owner)
    refused = next_link.read(doomed.read_all())
    assert finish(refused) is TransferState.FAILED
    assert isinstance(refused.error, TicketRejectedError)
    check_contents(reader, owner, next_link.read(owner.read_all()))


def test_a_source_that_is_stopped_ends_the_read_at_its_deadline(owner: Owner, reader: Reader) -> None:
    link = reader.connect(owner)
    os.kill(owner.process.pid, signal.SIGSTOP)
    transfer = link.read(owner.read_all())
    reader.clock.advance(DEADLINE_S - 0.1)
    assert transfer.poll() is TransferState.PENDING
    reader.clock.advance(0.1)
    assert finish(transfer) is TransferState.FAILED
    assert isinstance(transfer.error, DeadlineError)

    # It goes on, and what it sends for the read that is over goes nowhere.
    os.kill(owner.process.pid, signal.SIGCONT)
    wait_until(lambda: owner.ask("chunks") == "0")
    assert not reader.memory.block_rows.any()
    check_contents(reader, owner, link.read(owner.read_all()))


def test_a_reader_that_is_killed_under_a_send_frees_the_chunks(options: dict[str, str]) -> None:
    side = SourceSide(ManualClock(), NUM_BLOCKS, layout=LAYOUT)
    ticket = side.prefill(make_sequence(list(range(4 * TICKET_BLOCKS)), layout=LAYOUT))
    connector = UcxConnector(side.memory, MonotonicClock(), options=options)
    connector.serve(side.source)
    arguments = {
        "options": options,
        "epoch": side.memory.engine_epoch.hex(),
        "endpoint": connector.offer().endpoint.hex(),
        "ticket": msgspec.msgpack.encode(ticket).hex(),
    }
    puller = Child("ucx_puller.py", arguments)
    try:
        assert puller.ready == "asked"
        wait_until(lambda: connector.source.num_chunks_taken > 0)
    finally:
        killed_s = time.monotonic()
        puller.end(kill=True)
    wait_until(lambda: connector.source.num_chunks_taken + connector.source.num_readers == 0)
    assert time.monotonic() - killed_s < NOTICED_S
    connector.close()
    side.close()
