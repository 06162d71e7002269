"""The shared segment: what a peer sees of a pool, and what it refuses to map."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import torch
from handoff_sides import LAYOUT, fill_block, make_memory
from msgspec.structs import replace

from kvrelay_core.errors import ConfigError, MismatchError, TransferError
from kvrelay_transfer.memfd import create_memfd, seal
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.region import RegionHeader, RemoteRegion


def test_a_peer_sees_the_data_and_the_words() -> None:
    memory = make_memory(8)
    fill_block(memory, 5, seed=1)
    memory.words.bump(5)
    region = RemoteRegion.attach(memory.fd, LAYOUT, memory.engine_epoch)
    size_bytes = LAYOUT.block_bytes
    assert ctypes.string_at(region.block_address(5), size_bytes) == bytes(memory.block_rows[5].tolist())
    assert region.words.read([4, 5]) == (memory.words.read(4), memory.words.read(5))
    region.close()
    memory.close()


def test_blocks_of_the_tensor_are_contiguous_spans_on_a_page_border() -> None:
    memory = make_memory(8)
    assert memory.tensor.shape == (8, *LAYOUT.shape)
    assert memory.data_address % mmap.PAGESIZE == 0
    assert memory.tensor[3].is_contiguous()
    assert memory.tensor[3].data_ptr() == memory.data_address + 3 * LAYOUT.block_bytes
    memory.close()


def test_the_mapping_outlives_the_owner() -> None:
    memory = make_memory(4)
    memory.tensor[2] = 1.5
    region = RemoteRegion.attach(memory.fd, LAYOUT, memory.engine_epoch)
    memory.close()
    del memory
    values = (ctypes.c_float * 2).from_buffer_copy(ctypes.string_at(region.block_address(2), 8))
    assert list(values) == [1.5, 1.5]
    region.close()


def test_another_layout_is_a_mismatch() -> None:
    memory = make_memory(4)
    with pytest.raises(MismatchError):
        RemoteRegion.attach(memory.fd, replace(LAYOUT, head_dim=16), memory.engine_epoch)
    memory.close()


def test_another_start_is_refused() -> None:
    memory = make_memory(4)
    with pytest.raises(TransferError, match="another engine start"):
        RemoteRegion.attach(memory.fd, LAYOUT, b"f" * 16)
    memory.close()


def test_memory_that_its_owner_could_shrink_is_refused() -> None:
    fd = create_memfd("unsealed", 1 << 16, "")
    with pytest.raises(TransferError, match="not sealed"):
        RemoteRegion.attach(fd, LAYOUT, b"e" * 16)
    os.close(fd)


def test_a_segment_of_something_else_is_a_mismatch() -> None:
    fd = create_memfd("other", 1 << 16, "")
    seal(fd, future_writes=True)
    with pytest.raises(MismatchError):
        RemoteRegion.attach(fd, LAYOUT, b"e" * 16)
    os.close(fd)


def test_a_header_that_promises_more_than_there_is_is_refused() -> None:
    epoch = b"e" * 16
    header = RegionHeader.plan(LAYOUT, 1000, epoch, has_data=True)
    fd = create_memfd("lying", 1 << 16, "")
    os.pwrite(fd, header.pack(), 0)
    seal(fd, future_writes=True)
    with pytest.raises(TransferError, match="contradicts"):
        RemoteRegion.attach(fd, LAYOUT, epoch)
    os.close(fd)


def test_every_dtype_has_a_tensor() -> None:
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float8_e4m3", torch.float8_e4m3fn)):
        memory = make_memory(3, replace(LAYOUT, dtype=name))
        assert memory.tensor.dtype == dtype
        fill_block(memory, 1, seed=3)
        memory.close()


def test_a_pool_that_cannot_fit_names_the_flag() -> None:
    with pytest.raises(ConfigError, match="lower --kv-blocks"):
        PoolMemory.allocate(LAYOUT, 1 << 40, "cpu", b"e" * 16)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-blocks"):
        PoolMemory.allocate(LAYOUT, 1, "cpu", b"e" * 16)


def test_closing_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    memory = make_memory(4)
    region = RemoteRegion.attach(memory.fd, LAYOUT, memory.engine_epoch)
    region.close()
    memory.close()
    del memory, region
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_segment_of_a_gpu_pool_holds_the_words_alone() -> None:
    memory = make_memory(8, device="cuda")
    assert memory.tensor.is_cuda and memory.tensor.shape == (8, *LAYOUT.shape)
    memory.words.bump(3)
    region = RemoteRegion.attach(memory.fd, LAYOUT, memory.engine_epoch)
    assert region.data_bytes == 0
    assert region.words.read([2, 3]) == (memory.words.read(2), memory.words.read(3))
    region.close()
    memory.close()


def test_a_gpu_pool_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="use --device cpu"):
        PoolMemory.allocate(LAYOUT, 8, "cuda", b"e" * 16)
    assert len(os.listdir("/proc/self/fd")) == before
