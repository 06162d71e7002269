"""What every connector has to do: `kvrelay_transfer.connectors.base`, PROTOCOL A5, A6, E3.

Each test runs on each connector. Offers are the part of `test_connector_offers.py`, and shm is read from a source in
a process of its own in `test_shm_processes.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from connector_benches import ConnectorBench, Shapes, ShmBench, make_bench
from cuda_bench import NEEDS_GPU, CudaIpcBench
from cuda_source import CudaSource, other_device
from handoff_sides import wait_until
from msgspec.structs import replace
from ucx_bench import OVER_TCP, UcxBench

from kvrelay_core.errors import DeadlineError, KvRelayError, TransferError
from kvrelay_transfer.connectors.base import BlockRead, TransferState

CONNECTORS = [
    "memory", "shm", "grpc", "nixl", "ucx", "ucx-tcp", pytest.param("cuda_ipc", marks=[pytest.mark.gpu, NEEDS_GPU])
]  # fmt: skip


@pytest.fixture(scope="module")
def cuda_source() -> Iterator[CudaSource]:
    """The process that has the source's pool in GPU memory; CUDA does not map a pool into its own process."""
    source = CudaSource(other_device())
    yield source
    source.end()


def make_any_bench(name: str, directory: Path, request: pytest.FixtureRequest) -> ConnectorBench:
    match name:
        case "ucx":
            return UcxBench(Shapes())
        case "ucx-tcp":
            return UcxBench(Shapes(), OVER_TCP)
        case "cuda_ipc":
            return CudaIpcBench(request.getfixturevalue("cuda_source"), directory)
    return make_bench(name, directory)


@pytest.fixture(params=CONNECTORS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ConnectorBench]:
    bench = make_any_bench(request.param, tmp_path, request)
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
    assert tuple(transfer.words) == bench.ticket.groups[0].words
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
    assert tuple(transfer.words) == bench.words_of(remote)


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
    assert tuple(transfer.words) == tuple(expected)


def test_a_block_reused_during_the_read_shows_in_its_word(bench: ConnectorBench) -> None:
    remote, local = scattered(bench, 4)
    reused = remote[0]
    before = bench.side.memory.block_rows[reused].clone()
    transfer = bench.read_interrupted(bench.request(remote, local), lambda: bench.side.overwrite(reused))
    assert transfer.poll() is TransferState.DONE
    assert torch.equal(bench.memory.block_rows[local[0]], before), "the copy came before the reuse"
    assert transfer.words[0] == bench.words_of(remote)[0] + 1, "and the words were read after it"
    assert tuple(transfer.words[1:]) == bench.words_of(remote)[1:]


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
    assert not bench.can_recall or not bench.memory.block_rows[1:3].any()


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


def test_a_probe_says_how_fast_the_link_is(bench: ConnectorBench) -> None:
    wait_until(lambda: bench.link.probed_gb_per_s() is not None)
    gb_per_s = bench.link.probed_gb_per_s()
    assert gb_per_s is not None
    assert gb_per_s > 0.0 if bench.connector.name in ("shm", "nixl", "ucx", "cuda_ipc") else gb_per_s == 0.0
