"""cuda_ipc between two processes: whole and sliced blocks, and a source that is killed around a pull.

The contract that it shares with the other connectors is tested in tests/contract/test_connectors.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_bench import StreamGate
from cuda_source import PATTERN_PERIOD, CudaSource, OpenedPool, other_device
from handoff_sides import LAYOUT, make_memory, wait_until
from msgspec.structs import replace

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import ConfigError, TransferError
from kvrelay_core.request import AttemptId
from kvrelay_transfer.connectors.base import BlockRead, BlockSlices, PeerLink, SliceShape, Transfer, TransferState
from kvrelay_transfer.connectors.cuda_ipc import CudaIpcConnector
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.ticket import KvTicket, LeaseTerms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

READER = "cuda:0"
# Of Llama-3.1-8B with 64 tokens a block: 8 MiB.
LARGE = KvLayout("bfloat16", num_layers=32, num_kv_heads=8, block_tokens=64, head_dim=128)
LARGE_BLOCKS = 65  # to read into
# So much of the source's GPU that two such pools do not fit: a restarted source needs the first one's memory.
POOL_SHARE = 0.55
UNMAP_BUDGET_S = 2.0


@pytest.fixture
def source() -> Iterator[CudaSource]:
    source = CudaSource(other_device())
    yield source
    source.kill()
    source.end()


class Reader:
    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        self.memory: PoolMemory = make_memory(num_blocks, layout, READER)
        self.connector = CudaIpcConnector(self.memory, MonotonicClock(), None)

    def connect(self, opened: OpenedPool) -> PeerLink:
        return self.connector.connect(opened.peer, opened.offer)

    def close(self) -> None:
        self.connector.close()
        self.memory.close()


def read_of(remote: tuple[int, ...], local: tuple[int, ...], slices: BlockSlices | None = None) -> BlockRead:
    ticket = KvTicket("t", "s", "s", b"", AttemptId("r", "r", 1), b"", LAYOUT, (), 0, b"", LeaseTerms())
    return BlockRead(ticket, 0, remote, local, slices)


def finish(*transfers: Transfer) -> None:
    wait_until(lambda: all(transfer.poll().is_terminal for transfer in transfers))


def assert_pattern(memory: PoolMemory, remote: tuple[int, ...], local: tuple[int, ...]) -> None:
    """The blocks hold what `open_pattern` writes."""
    got = memory.block_rows[list(local)]
    expected = torch.tensor([block % PATTERN_PERIOD for block in remote], dtype=torch.uint8, device=READER)
    assert bool((got == expected[:, None]).all())


def assert_context_lives() -> None:
    """A kernel runs and is right."""
    left = torch.arange(4096, device=READER, dtype=torch.float64).reshape(64, 64)
    assert torch.equal((left @ left).cpu(), left.cpu() @ left.cpu())


# ------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("block_tokens", [1, 4, 16, 64], ids=lambda tokens: f"{tokens * 128}KiB")
@pytest.mark.parametrize("order", ["scattered", "neighbours"])
def test_blocks_arrive_by_copy_engines_and_by_kernel(
    source: CudaSource, tmp_path: Path, block_tokens: int, order: str
) -> None:
    layout = replace(LARGE, block_tokens=block_tokens, hash_unit_tokens=64)
    opened = source.open_pattern(layout, 512, tmp_path / "s")
    reader = Reader(layout, 64)
    link = reader.connect(opened)
    remote = tuple(range(511, 511 - 40 * 7, -7)) if order == "scattered" else tuple(range(300, 340))
    local = tuple(range(2, 42))
    transfer = link.read(read_of(remote, local))
    finish(transfer)
    assert transfer.poll() is TransferState.DONE
    assert_pattern(reader.memory, remote, local)
    assert not reader.memory.block_rows[[1, *range(42, 64)]].any()
    assert tuple(transfer.words) == source.words(remote)
    reader.close()


def test_sliced_reads_equal_a_naive_reshape(source: CudaSource, tmp_path: Path) -> None:
    """The source has blocks of 16 tokens and 4 heads, the reader blocks of 64 tokens and the last 2 of them."""
    theirs = KvLayout("bfloat16", 3, 4, 16, 32, hash_unit_tokens=64)
    ours = replace(theirs, num_kv_heads=2, block_tokens=64, tp_size=2, tp_rank=1)
    opened = source.open_ticket(theirs, 15 * 16, tmp_path / "s")
    assert opened.ticket is not None
    remote = opened.ticket.groups[0].blocks[:12]
    local = tuple(5 + index // 4 for index in range(12))
    head_bytes = 16 * 32 * 2
    shape = SliceShape(6, 2, head_bytes, 4 * head_bytes, head_bytes, 2 * 4 * head_bytes, 4 * head_bytes)
    offsets = BlockSlices(shape, (2 * head_bytes,) * 12, tuple(index % 4 * head_bytes for index in range(12)))
    reader = Reader(ours, 16)
    transfer = reader.connect(opened).read(read_of(remote, local, offsets))
    finish(transfer)
    assert transfer.poll() is TransferState.DONE and len(transfer.words) == 12

    blocks = source.block_rows().view(-1, *theirs.shape, 2)[list(remote)]  # [12, layers, 2, 4, 16, 32, bytes]
    tokens = blocks.permute(1, 2, 3, 0, 4, 5, 6).reshape(3, 2, 4, 12 * 16, 32, 2)[:, :, 2:]
    expected = tokens.reshape(3, 2, 2, 3, 64, 32, 2).permute(3, 0, 1, 2, 4, 5, 6).reshape(3, -1)
    assert torch.equal(reader.memory.block_rows[5:8].cpu(), expected)
    assert not reader.memory.block_rows[[1, 2, 3, 4, 8, 9]].any()
    reader.close()


def test_slices_that_leave_their_block_are_refused(source: CudaSource, tmp_path: Path) -> None:
    opened = source.open_pattern(LAYOUT, 8, tmp_path / "s")
    reader = Reader(LAYOUT, 8)
    link = reader.connect(opened)
    shape = SliceShape(1, 1, LAYOUT.block_bytes, 1, 1, 1, 1)
    for remote_offset, local_offset in ((16, 0), (0, 16), (-16, 0)):
        transfer = link.read(read_of((1,), (1,), BlockSlices(shape, (remote_offset,), (local_offset,))))
        assert transfer.poll() is TransferState.FAILED
    assert not reader.memory.block_rows.any()
    reader.close()


def test_a_pool_of_this_process_is_refused(tmp_path: Path) -> None:
    first, second = Reader(LAYOUT, 8), make_memory(8, LAYOUT, READER)
    serving = CudaIpcConnector(second, MonotonicClock(), tmp_path / "s")
    offer = serving.offer()
    assert offer is not None
    peer = OpenedPool(second.engine_epoch, offer, LAYOUT, None)
    with pytest.raises(TransferError, match="cannot be mapped"):
        first.connect(peer)
    assert_context_lives()
    serving.close()
    second.close()
    first.close()


# -------------------------------------------------------------------------------------------------- memory


def test_a_pool_gives_its_memory_back_when_the_last_tensor_is_gone() -> None:
    # Opening a context and torch's own caches are over before we count.
    make_memory(2, LAYOUT, READER).close()
    before = torch.cuda.mem_get_info(READER)[0]
    memory = make_memory(LARGE_BLOCKS, LARGE, READER)
    assert memory.data_address % 256 == 0 and not memory.tensor[-1].any()
    tensor = memory.tensor[3]
    assert torch.cuda.mem_get_info(READER)[0] <= before - LARGE_BLOCKS * LARGE.block_bytes
    memory.close()
    assert torch.cuda.mem_get_info(READER)[0] < before
    del tensor
    assert torch.cuda.mem_get_info(READER)[0] >= before - (2 << 20)


def test_a_pool_that_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(ConfigError, match="GiB are free; lower --kv-blocks"):
        make_memory(1 << 20, LARGE, READER)
    assert_context_lives()


# ---------------------------------------------------------------------------------------------- kill cells


def large_pool_blocks() -> int:
    return int(POOL_SHARE * torch.cuda.mem_get_info(other_device())[1]) // LARGE.block_bytes


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.timeout(180)
def test_a_reader_survives_the_death_of_its_source(source: CudaSource, tmp_path: Path, moment: str) -> None:
    num_blocks = large_pool_blocks()
    opened = source.open_pattern(LARGE, num_blocks, tmp_path / "s")
    reader = Reader(LARGE, LARGE_BLOCKS)
    link = reader.connect(opened)
    local = tuple(range(1, LARGE_BLOCKS))
    remote = tuple(range(num_blocks - 1, num_blocks - LARGE_BLOCKS, -1))
    finish(link.read(read_of(remote[:1], local[:1])))
    transfers: list[Transfer] = []
    if moment == "after":
        transfers.append(link.read(read_of(remote, local)))
        finish(*transfers)
    gate = StreamGate(reader.connector.copier.stream)
    if moment == "during":
        gate.shut()
        transfers += [link.read(read_of(remote, local)) for _ in range(8)]
        gate.open()
    source.kill()
    source.process.wait(timeout=30)
    died_s = time.monotonic()

    finish(*transfers)
    wait_until(lambda: link.read(read_of(remote, local)).poll() is TransferState.TORN_DOWN)
    for transfer in transfers:
        assert transfer.poll() in (TransferState.DONE, TransferState.TORN_DOWN)
    if transfers and transfers[0].poll() is TransferState.DONE:
        assert_pattern(reader.memory, remote, local)
    assert_context_lives()
    full = opened.layout.block_bytes * num_blocks
    wait_until(lambda: torch.cuda.mem_get_info(other_device())[0] > full)
    assert time.monotonic() - died_s < UNMAP_BUDGET_S

    restarted = CudaSource(other_device())
    again = restarted.open_pattern(LARGE, num_blocks, tmp_path / "s")
    with pytest.raises(TransferError, match="another engine start"):
        reader.connect(opened)
    transfer = reader.connect(again).read(read_of(remote, local))
    finish(transfer)
    assert transfer.poll() is TransferState.DONE
    assert_pattern(reader.memory, remote, local)
    restarted.end()
    reader.close()


def test_two_sources_and_a_reader_on_one_gpu(tmp_path: Path) -> None:
    """Workers of one GPU are processes of their own; CUDA maps between them as between two GPUs."""
    sources = [CudaSource(READER) for _ in range(2)]
    opened = [source.open_pattern(LAYOUT, 64, tmp_path / str(index)) for index, source in enumerate(sources)]
    reader = Reader(LAYOUT, 64)
    remote, local = tuple(range(63, 33, -1)), tuple(range(1, 31))
    for pool in opened:
        reader.memory.block_rows.zero_()
        torch.cuda.synchronize(READER)
        transfer = reader.connect(pool).read(read_of(remote, local))
        finish(transfer)
        assert transfer.poll() is TransferState.DONE
        assert_pattern(reader.memory, remote, local)
    reader.close()
    for source in sources:
        source.end()
