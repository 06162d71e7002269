"""The nixl connector against a source in a process of its own, that ends, stops, is killed, or is started again.

`cma` is what UCX takes on one host; `tcp` has no READ of its own, so that UCX emulates it: refused unless the operator
allows it, which the tests do that need a read to hang.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from connector_benches import ConnectorBench, make_bench
from handoff_sides import make_memory, wait_until
from nixl_owner import OWNER_BLOCKS, OWNER_FLOATS, OWNER_LAYOUT, OwnerProcess

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import DeadlineError, TransferError
from kvrelay_transfer.connectors.base import BlockRead, PeerLink, Transfer, TransferState
from kvrelay_transfer.connectors.nixl import NixlConnector
from kvrelay_transfer.connectors.nixl_agent import IndexArray, NixlAgent, PostedRead, PreparedSpans
from kvrelay_transfer.pool_memory import PoolMemory

DEADLINE_S = 1.5
EMULATED_TCP = {"UCX_TLS": "tcp", "UCX_PROTO_EMULATION_ENABLE": "y"}


@pytest.fixture(params=["cma", pytest.param("tcp", marks=pytest.mark.full)])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "tcp":
        for variable, value in EMULATED_TCP.items():
            monkeypatch.setenv(variable, value)
    return name


@pytest.fixture
def emulated_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in EMULATED_TCP.items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def start() -> Iterator[Callable[..., OwnerProcess]]:
    owners: list[OwnerProcess] = []

    def start(how: str = "nixl") -> OwnerProcess:
        owners.append(OwnerProcess(how))
        return owners[-1]

    yield start
    for owner in owners:
        owner.kill()
        owner.end()


@pytest.fixture(scope="module")
def living_owner() -> Iterator[OwnerProcess]:
    """For tests that leave it as it was."""
    owner = OwnerProcess()
    yield owner
    owner.kill()
    owner.end()


class Reader:
    def __init__(self, ticket_of: ConnectorBench, agent_type: type[NixlAgent]) -> None:
        self.memory: PoolMemory = make_memory(OWNER_BLOCKS, OWNER_LAYOUT)
        self.connector = NixlConnector(self.memory, MonotonicClock(), DEADLINE_S, agent_type)
        self._ticket = ticket_of.ticket
        self._is_closed = False

    def connect(self, owner: OwnerProcess) -> PeerLink:
        """To a pair that is warm."""
        link = self.connector.connect(owner.peer, owner.offer)
        wait_until(lambda: link.probed_gb_per_s() is not None)
        assert link.probed_gb_per_s() != 0.0
        return link

    def request(self, remote: tuple[int, ...], local: tuple[int, ...]) -> BlockRead:
        return BlockRead(self._ticket, 0, remote, local)

    def read_all(self, link: PeerLink, owner: OwnerProcess) -> None:
        """The owner holds i in block i."""
        blocks = tuple(range(1, OWNER_BLOCKS))
        transfer = link.read(self.request(blocks, tuple(reversed(blocks))))
        assert self.outcome(transfer) is TransferState.DONE, transfer.error
        assert tuple(transfer.words) == owner.words[1:]
        expected = torch.arange(OWNER_BLOCKS - 1, 0, -1, dtype=torch.float32)
        assert torch.equal(self.memory.tensor[1:].flatten(1), expected[:, None].expand(-1, OWNER_FLOATS))

    def outcome(self, transfer: Transfer) -> TransferState:
        wait_until(lambda: transfer.poll().is_terminal)
        return transfer.poll()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.connector.close()
            self.memory.close()


@pytest.fixture
def reader(tmp_path: Path, transport: str) -> Iterator[Reader]:
    yield from _reader(tmp_path)


@pytest.fixture
def tcp_reader(tmp_path: Path, emulated_tcp: None) -> Iterator[Reader]:
    yield from _reader(tmp_path)


@pytest.fixture
def plain_reader(tmp_path: Path) -> Iterator[Reader]:
    yield from _reader(tmp_path)


def _reader(tmp_path: Path, agent_type: type[NixlAgent] = NixlAgent) -> Iterator[Reader]:
    bench = make_bench("memory", tmp_path)
    reader = Reader(bench, agent_type)
    yield reader
    reader.close()
    bench.close()


def test_a_pool_of_another_process_is_read(reader: Reader, start: Callable[..., OwnerProcess]) -> None:
    owner = start()
    link = reader.connect(owner)
    reader.read_all(link, owner)
    owner.bump(7)
    transfer = link.read(reader.request((6, 7, 8), (1, 2, 3)))
    assert reader.outcome(transfer) is TransferState.DONE
    assert tuple(transfer.words) == (owner.words[6], owner.words[7] + 1, owner.words[8])


def test_a_source_at_rest_answers_a_reader_that_connects(
    plain_reader: Reader, start: Callable[..., OwnerProcess]
) -> None:
    owner = start("nixl-resting")
    plain_reader.read_all(plain_reader.connect(owner), owner)


def test_a_read_that_ucx_would_emulate_is_refused_at_connect(
    tmp_path: Path, living_owner: OwnerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    for reader in _reader(tmp_path):
        with pytest.raises(TransferError, match="NIXL could not post a read"):
            reader.connector.connect(living_owner.peer, living_owner.offer)
    assert living_owner.process.poll() is None


def test_a_source_killed_before_a_read_ends_it_at_once(reader: Reader, start: Callable[..., OwnerProcess]) -> None:
    owner = start()
    link = reader.connect(owner)
    owner.kill()
    for _ in range(2):
        started_s = time.monotonic()
        transfer = link.read(reader.request((1, 2), (1, 2)))
        assert reader.outcome(transfer) is TransferState.FAILED and isinstance(transfer.error, TransferError)
        assert time.monotonic() - started_s < DEADLINE_S
    assert not reader.memory.block_rows[1:3].any()
    link.close()
    reader.close()


def test_a_source_killed_during_a_read_ends_it_at_once(tcp_reader: Reader, start: Callable[..., OwnerProcess]) -> None:
    owner = start()
    link = tcp_reader.connect(owner)
    owner.stop()
    transfers = [link.read(tcp_reader.request((block,), (block,))) for block in range(1, 9)]
    assert {transfer.poll() for transfer in transfers} == {TransferState.PENDING}
    owner.kill()
    started_s = time.monotonic()
    assert {tcp_reader.outcome(transfer) for transfer in transfers} == {TransferState.FAILED}
    assert time.monotonic() - started_s < DEADLINE_S
    tcp_reader.memory.block_rows[1:9] = 123
    other = start()
    tcp_reader.memory.block_rows[9:].zero_()
    assert tcp_reader.outcome(tcp_reader.connect(other).read(tcp_reader.request((5,), (20,)))) is TransferState.DONE
    assert bool((tcp_reader.memory.block_rows[1:9] == 123).all())


@pytest.mark.full
def test_what_was_read_of_a_source_killed_after_it_stays(reader: Reader, start: Callable[..., OwnerProcess]) -> None:
    owner = start()
    link = reader.connect(owner)
    reader.read_all(link, owner)
    owner.kill()
    link.close()
    again = start()
    assert float(reader.memory.tensor[1].flatten()[0]) == OWNER_BLOCKS - 1
    with pytest.raises(TransferError, match="another engine start"):
        reader.connector.connect(owner.peer, again.offer)
    reader.read_all(reader.connect(again), again)


def test_a_stopped_source_is_read_where_hardware_or_kernel_do_it(
    plain_reader: Reader, living_owner: OwnerProcess
) -> None:
    link = plain_reader.connect(living_owner)
    living_owner.stop()
    plain_reader.read_all(link, living_owner)
    living_owner.resume()


def test_a_read_of_a_stopped_source_fails_at_its_deadline_and_ends_when_nothing_can_land(
    tcp_reader: Reader, start: Callable[..., OwnerProcess]
) -> None:
    owner = start()
    link = tcp_reader.connect(owner)
    owner.stop()
    transfer = link.read(tcp_reader.request((1, 2), (1, 2)))
    started_s = time.monotonic()
    wait_until(lambda: transfer.error is not None)
    assert DEADLINE_S * 0.9 < time.monotonic() - started_s < DEADLINE_S + 1.0
    assert isinstance(transfer.error, DeadlineError)
    assert transfer.poll() is TransferState.PENDING, "the source may still send"
    link.close()
    late = link.read(tcp_reader.request((3,), (3,)))
    assert late.poll() is TransferState.TORN_DOWN
    with pytest.raises(TransferError, match="have not ended"):
        tcp_reader.connector.connect(owner.peer, owner.offer)
    owner.resume()
    assert tcp_reader.outcome(transfer) is TransferState.TORN_DOWN
    assert isinstance(transfer.error, DeadlineError) and transfer.words == ()
    tcp_reader.read_all(tcp_reader.connect(owner), owner)


def test_a_link_that_has_failed_connects_again_for_the_next_read(tmp_path: Path, living_owner: OwnerProcess) -> None:
    failing: list[bool] = []

    class FailingAgent(NixlAgent):
        def post_read(self, local: PreparedSpans, to: IndexArray, remote: PreparedSpans, of: IndexArray) -> PostedRead:
            if failing:
                raise TransferError("a cable was pulled")
            return super().post_read(local, to, remote, of)

    for reader in _reader(tmp_path, FailingAgent):
        link = reader.connect(living_owner)
        failing.append(True)
        transfer = link.read(reader.request((1,), (1,)))
        assert reader.outcome(transfer) is TransferState.FAILED and "cable" in str(transfer.error)
        failing.clear()
        reader.read_all(link, living_owner)


def test_closing_the_connector_ends_what_hangs(tcp_reader: Reader, start: Callable[..., OwnerProcess]) -> None:
    owner = start()
    link = tcp_reader.connect(owner)
    owner.stop()
    transfer = link.read(tcp_reader.request((1, 2), (1, 2)))
    tcp_reader.close()
    assert transfer.poll() is TransferState.TORN_DOWN
    assert not tcp_reader.memory.block_rows[1:3].any()


def test_a_closed_connector_leaves_no_thread_and_no_descriptor(tmp_path: Path, living_owner: OwnerProcess) -> None:
    counts: list[tuple[int, int]] = []
    for _ in range(3):
        for reader in _reader(tmp_path):
            reader.read_all(reader.connect(living_owner), living_owner)
        gc.collect()  # the pool's mapping holds a descriptor
        counts.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    assert counts[1] == counts[2]
