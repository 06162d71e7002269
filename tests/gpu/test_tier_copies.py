"""KV between a pool on a GPU and pinned host memory: the same parts as from a pool on CPU, and a chain of both."""

from __future__ import annotations

import os
import time

import pytest
import torch
from handoff_sides import wait_until

from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.tiers.chain import TierChain
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.kv_records import KvRecords
from kvrelay_transfer.tiers.part_key import KeyMaker
from kvrelay_transfer.tiers.records import RecordDestination

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

NUM_BLOCKS = 33


def pool_of(block_tokens: int, device: str) -> PoolMemory:
    layout = KvLayout("bfloat16", 28, 8, block_tokens, 128)
    return PoolMemory.allocate(layout, NUM_BLOCKS, device, os.urandom(16))


def records_of(memory: PoolMemory) -> KvRecords:
    assert isinstance(memory.layout, KvLayout)
    return KvRecords(memory, KvChunks.of(memory.layout), KeyMaker((b"kv",)))


@pytest.mark.parametrize("block_tokens", [16, 64])
def test_what_leaves_a_gpu_comes_back_into_another_pool(block_tokens: int) -> None:
    source = pool_of(16, "cuda")
    source.block_rows.random_(0, 256)
    torch.cuda.synchronize()
    target = pool_of(block_tokens, "cuda")
    leaving, coming = records_of(source), records_of(target)
    chain = TierChain(HostStore(HostSlab(256 << 20, max(leaving.chunks.part_bytes), is_pinned=True)))
    num_records = 8
    per_record = coming.chunks.num_blocks
    records = [leaving.record(bytes([number])) for number in range(num_records)]
    for number, record in enumerate(records):
        blocks = range(1 + number * 4, 5 + number * 4)
        assert chain.offer(record, leaving.source(list(blocks)))
    assert chain.drain(30)

    def take_room(first: int, end: int) -> list[RecordDestination]:
        starts = (1 + number * per_record for number in range(first, end))
        return [coming.destination(list(range(start, start + per_record))) for start in starts]

    fetch = chain.fetch(records, take_room, time.monotonic() + 30, lambda num_records, seconds: True)

    def is_terminal() -> bool:
        fetch.poll()
        return fetch.is_terminal

    wait_until(is_terminal)
    chain.close()
    assert fetch.num_loaded == num_records

    def tokens(memory: PoolMemory) -> torch.Tensor:
        used = memory.tensor[1 : 1 + num_records * 64 // memory.tensor.shape[4]].view(torch.int16)
        return used.permute(1, 2, 3, 0, 4, 5).reshape(28, 2, 8, -1, 128)

    assert torch.equal(tokens(source), tokens(target))


def test_pinned_memory_is_pinned() -> None:
    slab = HostSlab(64 << 20, 4 << 20, is_pinned=True)
    assert torch.frombuffer(slab.slot(slab.num_slots - 1), dtype=torch.uint8).is_pinned()
