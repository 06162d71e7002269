"""The nixl connector between pools in GPU memory: of two GPUs where there are two, else of two processes on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from connector_benches import ConnectorBench, make_bench
from handoff_sides import make_memory, wait_until
from nixl_owner import OWNER_BLOCKS, OWNER_FLOATS, OWNER_LAYOUT, OwnerProcess

from kvrelay_core.clock import MonotonicClock
from kvrelay_transfer.connectors.base import BlockRead, TransferState
from kvrelay_transfer.connectors.nixl import NixlConnector

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.fixture
def any_ticket(tmp_path: Path) -> Iterator[ConnectorBench]:
    bench = make_bench("memory", tmp_path)
    yield bench
    bench.close()


def test_blocks_in_gpu_memory_and_words_in_host_memory_arrive(any_ticket: ConnectorBench) -> None:
    owner = OwnerProcess(device="cuda:0")
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
    assert transfer.words == (*owner.words[1:7], owner.words[7] + 1, *owner.words[8:])
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
    owner.end()
