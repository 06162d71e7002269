"""KV chunks: how they are cut, and that their parts are the same whatever pool they come from."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.tiers.kv_chunks import KvChunks
from kvrelay_transfer.tiers.kv_records import KvRecords
from kvrelay_transfer.tiers.part_key import KeyMaker
from kvrelay_transfer.tiers.records import PART_BYTES, Record, RecordDestination, RecordSource

LAYOUT = KvLayout("bfloat16", 5, 2, 4, 8, hash_unit_tokens=16)
CHUNK_TOKENS = 16
KEYS = KeyMaker((b"kv",))


def pool_of(layout: KvLayout, num_blocks: int = 40) -> PoolMemory:
    memory = PoolMemory.allocate(layout, num_blocks, "cpu", os.urandom(16))
    generator = torch.Generator().manual_seed(layout.block_tokens)
    memory.block_rows.random_(0, 256, generator=generator)
    return memory


def records_of(memory: PoolMemory, part_layers: int = 2) -> KvRecords:
    assert isinstance(memory.layout, KvLayout)
    return KvRecords(memory, KvChunks(memory.layout, CHUNK_TOKENS, part_layers), KEYS)


def parts_of(record: Record, source: RecordSource) -> list[bytearray]:
    parts = [bytearray(size_bytes) for size_bytes in record.part_bytes]
    for number, part in enumerate(parts):
        source.copy_out(number, memoryview(part))
    return parts


def load(destination: RecordDestination, parts: Sequence[bytearray]) -> None:
    for number, part in enumerate(parts):
        destination.copy_in(number, memoryview(part))


def canonical(memory: PoolMemory, blocks: Sequence[int]) -> torch.Tensor:
    """[layers, 2, heads, tokens, head_dim], as bytes of each element."""
    return torch.cat([memory.tensor[block].view(torch.int16) for block in blocks], dim=3)


def test_a_record_is_the_canonical_tensor_cut_by_layers() -> None:
    memory = pool_of(LAYOUT)
    records = records_of(memory)
    blocks = [7, 3, 4, 39]
    record = records.record(b"hash")
    assert len(record.keys) == 3 and record.size_bytes == 4 * LAYOUT.block_bytes
    assert record.keys == records.record(b"hash").keys != records.record(b"other").keys
    parts = parts_of(record, records.source(blocks))
    assert b"".join(parts) == canonical(memory, blocks).numpy().tobytes()


@pytest.mark.parametrize("block_tokens", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("part_layers", [1, 2, 5])
def test_it_comes_back_into_blocks_of_any_size(block_tokens: int, part_layers: int) -> None:
    memory = pool_of(LAYOUT)
    records = records_of(memory, part_layers)
    parts = parts_of(records.record(b"hash"), records.source([5, 1, 2, 30]))
    layout = KvLayout("bfloat16", 5, 2, block_tokens, 8, hash_unit_tokens=16)
    other = pool_of(layout)
    before = other.tensor.clone()
    blocks = [9, 4, 5, 6, 31, 2, 17, 18, 19, 20, 21, 22, 39, 38, 1, 8][: CHUNK_TOKENS // block_tokens]
    others = records_of(other, part_layers)
    assert others.record(b"hash") == records.record(b"hash")
    load(others.destination(blocks), parts)
    assert torch.equal(canonical(other, blocks), canonical(memory, [5, 1, 2, 30]))
    untouched = [block for block in range(40) if block not in blocks]
    assert torch.equal(other.tensor[untouched].view(torch.int16), before[untouched].view(torch.int16))


def test_a_source_is_intact_until_one_of_its_blocks_is_given_away() -> None:
    memory = pool_of(LAYOUT)
    source = records_of(memory).source([7, 3, 4, 39])
    memory.words.bump(5)
    assert source.is_intact()
    memory.words.bump(39)
    assert not source.is_intact()
    assert records_of(memory).source([7, 3, 4, 39]).is_intact(), "as of now"


@pytest.mark.parametrize(
    ("layout", "chunk_tokens", "num_parts"),
    [
        (KvLayout("bfloat16", 28, 8, 16, 128), 64, 2),  # Qwen3-1.7B: 112 KiB a token
        (KvLayout("bfloat16", 28, 8, 128, 128), 128, 4),  # blocks are not cut
        (KvLayout("bfloat16", 80, 8, 16, 128), 64, 5),  # 320 KiB a token
        (KvLayout("float32", 4, 2, 16, 16), 256, 1),  # 1 KiB a token
        (KvLayout("bfloat16", 10, 4, 16, 64), 256, 1),  # 10 KiB a token
        (KvLayout("float8_e4m3", 1, 1, 1, 1, hash_unit_tokens=1), 256, 1),
    ],
)
def test_chunks_are_of_about_a_part(layout: KvLayout, chunk_tokens: int, num_parts: int) -> None:
    chunks = KvChunks.of(layout)
    assert (chunks.chunk_tokens, chunks.num_parts) == (chunk_tokens, num_parts)
    assert max(chunks.part_bytes) <= PART_BYTES
    assert sum(chunks.part_bytes) == chunks.num_blocks * layout.block_bytes


def test_a_layer_that_is_larger_than_a_part_is_one() -> None:
    chunks = KvChunks.of(KvLayout("float32", 2, 128, 128, 128))
    assert chunks.num_parts == 2 and min(chunks.part_bytes) > PART_BYTES
