"""The shape of embedding pools: sizes, and which pools can exchange blocks."""

from __future__ import annotations

import msgspec
import pytest

from kvrelay_core.errors import ConfigError, MismatchError
from kvrelay_transfer.embedding_layout import EmbeddingLayout, PoolLayout
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory

LAYOUT = EmbeddingLayout("float32", 8, 4)
KV = KvLayout(dtype="float32", num_layers=1, num_kv_heads=1, block_tokens=4, head_dim=8, hash_unit_tokens=4)


def test_sizes() -> None:
    assert (LAYOUT.shape, LAYOUT.row_bytes, LAYOUT.block_bytes) == ((4, 8), 32, 128)
    assert [LAYOUT.blocks_for(count) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("source", "field"),
    [(EmbeddingLayout("bfloat16", 8, 4), "dtype"), (EmbeddingLayout("float32", 16, 4), "hidden_size"),
     (EmbeddingLayout("float32", 8, 8), "block_tokens"), (KV, "layout")],
)  # fmt: skip
def test_pools_that_differ_do_not_exchange_blocks(source: PoolLayout, field: str) -> None:
    with pytest.raises(MismatchError) as caught:
        LAYOUT.check_compatible(source)
    assert caught.value.metadata["field"] == field
    assert LAYOUT.fingerprint() != source.fingerprint()


def test_kv_is_not_read_from_an_encoder() -> None:
    with pytest.raises(MismatchError):
        KV.check_compatible(LAYOUT)


def test_nonsense_is_refused() -> None:
    for layout in (EmbeddingLayout("int3", 8), EmbeddingLayout("float32", 0), EmbeddingLayout("float32", 8, 0)):
        with pytest.raises(ConfigError):
            layout.validate()


def test_messages_tell_the_kinds_apart() -> None:
    for layout in (LAYOUT, KV):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=PoolLayout) == layout


def test_a_pool_of_rows() -> None:
    memory = PoolMemory.allocate(LAYOUT, 3, "cpu", b"e" * 16)
    assert tuple(memory.tensor.shape) == (3, 4, 8) and memory.block_rows.shape == (3, 128)
    memory.close()
