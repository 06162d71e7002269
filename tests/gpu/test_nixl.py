"""The nixl connector between pools in GPU memory: of two GPUs where there are two, else of two processes on one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from connector_benches import ConnectorBench, make_bench
from cuda_source import other_device
from handoff_sides import make_memory, wait_until
from nixl_owner import OWNER_BLOCKS, OWNER_FLOATS, OWNER_LAYOUT, OwnerProcess

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.base import BlockRead, Transfer, TransferState
from kvrelay_transfer.connectors.nixl import NixlConnector
from kvrelay_transfer.pool_memory import PoolMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

READER = "cuda:0"
LARGE_FLOATS = 2 << 20  # blocks of 8 MiB
LARGE_BLOCKS = 65  # to read into
# Two such pools fit: UCX keeps what it has mapped of a dead source until the reader's process ends (ADR 0012).
POOL_SHARE = 0.3
NOTICE_BUDGET_S = 1.0


@pytest.fixture
def any_ticket(tmp_path: Path) -> Iterator[ConnectorBench]:
    bench = make_bench("memory", tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def start() -> Iterator[Callable[..., OwnerProcess]]:
    owners: list[OwnerProcess] = []

    def start(device: str, *sizes: int) -> OwnerProcess:
        owners.append(OwnerProcess("nixl", device, *sizes))
        return owners[-1]

    yield start
    for owner in owners:
        owner.kill()
        owner.end()


def test_blocks_in_gpu_memory_and_words_in_host_memory_arrive(
    any_ticket: ConnectorBench, start: Callable[..., OwnerProcess]
) -> None:
    owner = start("cuda:0")
    memory = make_memory(OWNER_BLOCKS, OWNER_LAYOUT, f"cuda:{torch.cuda.device_count() - 1}")
    connector = NixlConnector(memory, MonotonicClock())
    link = connector.connect(owner.peer, owner.offer)
    wait_until(lambda: link.probed_gb_per_s() is not None)
    assert link.probed_gb_per_s() != 0.0
    owner.bump(7)
    blocks = tuple(range(1, OWNER_BLOCKS))
    transfer = link.read(BlockRead(any_ticket.ticket, 0, blocks, tuple(reversed(blocks))))
    wait_until(lambda: transfer.poll().is_terminal)
    assert transfer.poll() is TransferState.DONE, transfer.error
    assert tuple(transfer.words) == (*owner.words[1:7], owner.words[7] + 1, *owner.words[8:])
    expected = torch.arange(OWNER_BLOCKS - 1, 0, -1, dtype=torch.float32)
    expected[OWNER_BLOCKS - 1 - 7] = -1.0
    assert torch.equal(memory.tensor[1:].flatten(1).cpu(), expected[:, None].expand(-1, OWNER_FLOATS))
    owner.kill()
    late = link.read(BlockRead(any_ticket.ticket, 0, (1,), (1,)))
    wait_until(lambda: late.poll().is_terminal)
    assert late.poll() is TransferState.FAILED
    assert float(memory.tensor.sum()) != 0.0, "the context of the reader survives its source"
    connector.close()
    memory.close()


class LargeReader:
    """Of the last blocks of a large pool."""

    def __init__(self, owner: OwnerProcess, num_blocks: int, any_ticket: ConnectorBench) -> None:
        self.memory: PoolMemory = make_memory(LARGE_BLOCKS, owner.layout, READER)
        self.connector = NixlConnector(self.memory, MonotonicClock())
        self.request = BlockRead(
            any_ticket.ticket,
            0,
            tuple(range(num_blocks - 1, num_blocks - LARGE_BLOCKS, -1)),
            tuple(range(1, LARGE_BLOCKS)),
        )

    def assert_arrived(self) -> None:
        got = self.memory.tensor[1:].flatten(1)
        expected = torch.tensor(self.request.remote_blocks, dtype=torch.float32, device=READER)
        assert bool((got == expected[:, None]).all())

    def assert_context_lives(self) -> None:
        """A kernel runs and is right."""
        left = torch.arange(4096, device=READER, dtype=torch.float64).reshape(64, 64)
        assert torch.equal((left @ left).cpu(), left.cpu() @ left.cpu())

    def close(self) -> None:
        self.connector.close()
        self.memory.close()


def finish(*transfers: Transfer) -> None:
    wait_until(lambda: all(transfer.poll().is_terminal for transfer in transfers))


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.timeout(180)
def test_a_reader_survives_the_death_of_its_source(
    any_ticket: ConnectorBench, start: Callable[..., OwnerProcess], moment: str
) -> None:
    num_blocks = int(POOL_SHARE * torch.cuda.mem_get_info(other_device())[1]) // (4 * LARGE_FLOATS)
    owner = start(other_device(), num_blocks, LARGE_FLOATS)
    reader = LargeReader(owner, num_blocks, any_ticket)
    link = reader.connector.connect(owner.peer, owner.offer)
    wait_until(lambda: link.probed_gb_per_s() is not None)
    transfers: list[Transfer] = []
    if moment == "after":
        transfers.append(link.read(reader.request))
        finish(*transfers)
        assert transfers[0].poll() is TransferState.DONE
    elif moment == "during":
        transfers += [link.read(reader.request) for _ in range(40)]
        wait_until(lambda: transfers[0].poll().is_terminal)
        assert transfers[-1].poll() is TransferState.PENDING
    owner.kill()
    died_s = time.monotonic()

    finish(*transfers)
    late = link.read(reader.request)
    finish(late)
    assert late.poll() is TransferState.FAILED and isinstance(late.error, TransferError)
    assert time.monotonic() - died_s < NOTICE_BUDGET_S
    assert {transfer.poll() for transfer in transfers} <= {TransferState.DONE, TransferState.FAILED}
    if moment != "before":
        reader.assert_arrived()
    reader.assert_context_lives()
    link.close()

    restarted = start(other_device(), num_blocks, LARGE_FLOATS)
    with pytest.raises(TransferError, match="another engine start"):
        reader.connector.connect(owner.peer, restarted.offer)
    reader.memory.tensor.zero_()
    torch.cuda.synchronize(READER)
    transfer = reader.connector.connect(restarted.peer, restarted.offer).read(reader.request)
    finish(transfer)
    assert transfer.poll() is TransferState.DONE, transfer.error
    reader.assert_arrived()
    reader.close()
