"""What every connector has to do: `kvrelay_transfer.connectors.base`, PROTOCOL A5, A6, E3.

Each test runs on each connector. The suite ends with shm against a source in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from connector_benches import ConnectorBench, GrpcBench, ShmBench, make_bench
from handoff_sides import ADDRESS, LAYOUT, MODEL, make_memory, wait_until
from msgspec.structs import replace

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import ConfigError, DeadlineError, KvRelayError, TransferError
from kvrelay_transfer.connectors.base import BlockRead, ConnectorOffer, PeerInfo, TransferState
from kvrelay_transfer.connectors.registry import choose, create_connectors
from kvrelay_transfer.connectors.shm import ShmConnector, ShmEndpoint
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory

CONNECTORS = ["memory", "shm", "grpc"]


@pytest.fixture(params=CONNECTORS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ConnectorBench]:
    bench = make_bench(request.param, tmp_path)
    yield bench
    bench.close()


def scattered(bench: ConnectorBench, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Source and destination blocks of which no two are neighbours on both sides."""
    remote = bench.blocks[:count]
    return remote, tuple(range(2 * count, 0, -2))


def test_data_and_words_arrive_bit_equal(bench: ConnectorBench) -> None:
    local = tuple(range(10, 10 + len(bench.blocks)))
    transfer = bench.link.read(bench.request(bench.blocks, local))
    bench.finish(transfer)
    assert transfer.poll() is TransferState.DONE and transfer.error is None
    assert torch.equal(bench.memory.block_rows[list(local)], bench.side.memory.block_rows[list(bench.blocks)])
    assert transfer.words == bench.ticket.groups[0].words
    untouched = [block for block in range(bench.memory.num_blocks) if block not in local]
    assert not bench.memory.block_rows[untouched].any()


def test_scattered_blocks_arrive_where_they_were_sent(bench: ConnectorBench) -> None:
    generator = random.Random(5)
    remote = tuple(generator.sample(bench.blocks, 11))
    local = tuple(generator.sample(range(1, bench.memory.num_blocks), 11))
    transfer = bench.link.read(bench.request(remote, local))
    bench.finish(transfer)
    assert transfer.poll() is TransferState.DONE
    assert torch.equal(bench.memory.block_rows[list(local)], bench.side.memory.block_rows[list(remote)])
    assert transfer.words == bench.words_of(remote)


def test_many_reads_at_once(bench: ConnectorBench) -> None:
    transfers = [bench.link.read(bench.request((block,), (index + 1,))) for index, block in enumerate(bench.blocks)]
    bench.finish(*transfers)
    assert {transfer.poll() for transfer in transfers} == {TransferState.DONE}
    assert tuple(word for transfer in transfers for word in transfer.words) == bench.ticket.groups[0].words
    local = list(range(1, len(transfers) + 1))
    assert torch.equal(bench.memory.block_rows[local], bench.side.memory.block_rows[list(bench.blocks)])


def test_a_block_reused_before_the_read_shows_in_its_word(bench: ConnectorBench) -> None:
    reused = bench.blocks[2]
    bench.side.overwrite(reused)
    transfer = bench.link.read(bench.request(bench.blocks[:4], (1, 2, 3, 4)))
    bench.finish(transfer)
    assert transfer.poll() is TransferState.DONE
    expected = list(bench.words_of(bench.blocks[:4]))
    assert transfer.words[2] != expected[2]
    expected[2] = bench.side.memory.words.read(reused)
    assert transfer.words == tuple(expected)


def test_a_block_reused_during_the_read_shows_in_its_word(bench: ConnectorBench) -> None:
    remote, local = scattered(bench, 4)
    reused = remote[0]
    before = bench.side.memory.block_rows[reused].clone()
    transfer = bench.read_interrupted(bench.request(remote, local), lambda: bench.side.overwrite(reused))
    assert transfer.poll() is TransferState.DONE
    assert torch.equal(bench.memory.block_rows[local[0]], before), "the copy came before the reuse"
    assert transfer.words[0] == bench.words_of(remote)[0] + 1, "and the words were read after it"
    assert transfer.words[1:] == bench.words_of(remote)[1:]


def test_a_restarted_source_is_not_read(bench: ConnectorBench) -> None:
    """Either the link refuses the other epoch, or the source refuses the ticket."""
    peer = bench.peer(epoch=b"another epoch...")
    ticket = replace(bench.ticket, engine_epoch=peer.engine_epoch)
    try:
        link = bench.connector.connect(peer, bench.offer)
    except TransferError:
        return
    transfer = link.read(BlockRead(ticket, 0, bench.blocks[:1], (1,)))
    bench.finish(transfer)
    assert transfer.poll() is TransferState.FAILED and transfer.error is not None
    assert not bench.memory.block_rows[1].any()
    link.close()


def test_an_aborted_read_owns_its_destination_until_it_is_terminal(bench: ConnectorBench) -> None:
    bench.stall()
    transfer = bench.link.read(bench.request(bench.blocks[:3], (1, 2, 3)))
    assert transfer.poll() is TransferState.PENDING
    transfer.abort()
    transfer.abort()
    bench.resume()
    bench.finish(transfer)
    assert transfer.poll() is not TransferState.PENDING
    # Terminal: the blocks are ours again, and nobody else writes to them.
    bench.memory.block_rows[1:4] = 123
    after = bench.link.read(bench.request(bench.blocks[3:5], (5, 6)))
    bench.finish(after)
    assert after.poll() is TransferState.DONE
    assert bool((bench.memory.block_rows[1:4] == 123).all())


def test_an_abort_in_the_middle_of_a_shm_copy_waits_for_the_copier(tmp_path: Path) -> None:
    bench = make_bench("shm", tmp_path)
    remote, local = scattered(bench, 4)
    states: list[TransferState] = []

    def abort_while_copying() -> None:
        transfer.abort()
        states.append(transfer.poll())

    bench.stall()
    assert isinstance(bench, ShmBench)
    bench.gated.watch(lambda look: abort_while_copying() if look == 3 else None)
    transfer = bench.link.read(bench.request(remote, local))
    bench.resume()
    bench.finish(transfer)
    assert states == [TransferState.PENDING], "the copier still holds the destination"
    assert transfer.poll() is TransferState.FAILED
    assert not bench.memory.block_rows[list(local[3:])].any()
    bench.close()


def test_closing_the_link_tears_down_what_is_posted(bench: ConnectorBench) -> None:
    bench.stall()
    transfers = [bench.link.read(bench.request((block,), (block,))) for block in bench.blocks[:3]]
    bench.link.close()
    bench.resume()
    bench.finish(*transfers)
    assert {transfer.poll() for transfer in transfers} == {TransferState.TORN_DOWN}
    assert all(isinstance(transfer.error, TransferError) for transfer in transfers)
    late = bench.link.read(bench.request(bench.blocks[:1], (1,)))
    assert late.poll() is TransferState.TORN_DOWN


def test_a_read_that_does_not_progress_ends_at_its_deadline(bench: ConnectorBench) -> None:
    bench.stall()
    transfer = bench.link.read(bench.request(bench.blocks[:2], (1, 2)))
    bench.clock.advance(bench.deadline_s - 0.5)
    assert transfer.poll() is TransferState.PENDING
    bench.clock.advance(0.5)
    bench.resume()
    if transfer.poll() is TransferState.PENDING:
        wait_until(lambda: transfer.poll().is_terminal)
    assert transfer.poll() is TransferState.FAILED
    assert isinstance(transfer.error, DeadlineError)
    assert not bench.memory.block_rows[1:3].any()


@pytest.mark.parametrize(("remote", "local"), [(10**6, 1), (1, 10**6), (0, 1), (1, 0)])
def test_blocks_outside_the_pools_fail(bench: ConnectorBench, remote: int, local: int) -> None:
    transfer = bench.link.read(bench.request((remote,), (local,)))
    bench.finish(transfer)
    assert transfer.poll() is TransferState.FAILED
    assert isinstance(transfer.error, KvRelayError)


def test_terminal_states_are_final(bench: ConnectorBench) -> None:
    transfer = bench.link.read(bench.request(bench.blocks[:2], (1, 2)))
    bench.finish(transfer)
    transfer.abort()
    bench.link.close()
    bench.clock.advance(100.0)
    assert transfer.poll() is TransferState.DONE and transfer.error is None


# ------------------------------------------------------------------------------------- offers and the choice


def test_a_probe_says_how_fast_the_link_is(bench: ConnectorBench) -> None:
    wait_until(lambda: bench.link.probed_gb_per_s() is not None)
    gb_per_s = bench.link.probed_gb_per_s()
    assert gb_per_s is not None
    assert gb_per_s > 0.0 if bench.connector.name == "shm" else gb_per_s == 0.0


def shm_connector(tmp_path: Path) -> tuple[PoolMemory, ShmConnector]:
    memory = make_memory()
    return memory, ShmConnector(memory, MonotonicClock(), tmp_path / "reader.sock")


@pytest.mark.parametrize("endpoint", [b"", b"\xff\xff", b"garbage"])
def test_shm_refuses_an_endpoint_that_it_cannot_read(tmp_path: Path, endpoint: bytes) -> None:
    memory, connector = shm_connector(tmp_path)
    peer = PeerInfo(ADDRESS, b"e" * 16, MODEL, LAYOUT, ())
    with pytest.raises(TransferError, match="cannot read"):
        connector.connect(peer, ConnectorOffer("shm", endpoint))
    connector.close()
    memory.close()


def test_shm_refuses_another_host(tmp_path: Path) -> None:

    memory, connector = shm_connector(tmp_path)
    endpoint = msgspec.msgpack.encode(ShmEndpoint("another boot", str(tmp_path / "reader.sock")))
    peer = PeerInfo(ADDRESS, memory.engine_epoch, MODEL, LAYOUT, ())
    with pytest.raises(TransferError, match="another host"):
        connector.connect(peer, ConnectorOffer("shm", endpoint))
    connector.close()
    memory.close()


def test_shm_refuses_a_pool_of_another_layout(tmp_path: Path) -> None:
    memory, connector = shm_connector(tmp_path)
    other = make_memory(8, replace(LAYOUT, head_dim=16))
    reader = ShmConnector(other, MonotonicClock(), None)
    offer = connector.offer()
    assert offer is not None and reader.offer() is None
    peer = PeerInfo(ADDRESS, memory.engine_epoch, MODEL, LAYOUT, (offer,))
    with pytest.raises(TransferError, match="another layout"):
        reader.connect(peer, offer)
    for closable in (reader, connector, memory, other):
        closable.close()


def test_connectors_are_tried_in_our_order(tmp_path: Path) -> None:
    bench = make_bench("grpc", tmp_path)
    assert isinstance(bench, GrpcBench)
    ours = create_connectors(
        ["auto"],
        memory=bench.memory,
        run_dir=tmp_path,
        worker_id="decode/0",
        staging=bench.staging,
        socket_half=bench.pump,
        clock=bench.clock,
    )
    assert list(ours) == ["shm", "grpc"]
    offers = [ConnectorOffer("grpc", b""), ConnectorOffer("rdma", b""), ConnectorOffer("shm", b"x")]
    assert [connector.name for connector, _ in choose(offers, ours)] == ["shm", "grpc"]
    assert [offer.endpoint for _, offer in choose(offers, ours)] == [b"x", b""]
    assert list(choose([ConnectorOffer("rdma", b"")], ours)) == []
    for connector in ours.values():
        connector.close()
    bench.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_connector_is_a_config_error(tmp_path: Path) -> None:
    bench = make_bench("grpc", tmp_path)
    assert isinstance(bench, GrpcBench)
    with pytest.raises(ConfigError, match="there are: auto, shm, grpc"):
        create_connectors(
            ["pigeon"],
            memory=bench.memory,
            run_dir=tmp_path,
            worker_id="w",
            staging=bench.staging,
            socket_half=bench.pump,
            clock=bench.clock,
        )
    bench.close()


# --------------------------------------------------------------------------------- shm across two processes

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
