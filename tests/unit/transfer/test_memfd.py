"""Reserved, sealed memory; and the refusal, in numbers, when there is too little of it."""

from __future__ import annotations

import mmap
import os

import pytest

from kvrelay_core.errors import ConfigError
from kvrelay_transfer import memfd
from kvrelay_transfer.host_memory import available_bytes
from kvrelay_transfer.memfd import create_memfd, is_sealed, seal


def test_memory_is_reserved_at_once() -> None:
    fd = create_memfd("test", 3 << 20, "")
    assert os.fstat(fd).st_blocks * 512 >= 3 << 20
    os.close(fd)


def test_a_sealed_segment_keeps_its_size_and_takes_no_new_writer() -> None:
    fd = create_memfd("test", 1 << 16, "")
    owner = mmap.mmap(fd, 1 << 16)
    assert not is_sealed(fd)
    seal(fd, future_writes=False)
    assert is_sealed(fd)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1 << 15)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1 << 17)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 1 << 16)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    reader = mmap.mmap(fd, 1 << 16, mmap.MAP_SHARED, mmap.PROT_READ)
    owner[5] = 7
    assert reader[5] == 7
    with pytest.raises(TypeError):
        reader[5] = 8
    reader.close()
    owner.close()
    os.close(fd)


def test_short_memory_is_refused_with_the_numbers_and_the_flag() -> None:
    too_much = available_bytes() + (64 << 30)
    with pytest.raises(ConfigError, match=r"needs \d+\.\d\d GiB.*, \d+\.\d\d GiB are free; lower --kv-blocks"):
        create_memfd("the KV pool", too_much, "lower --kv-blocks (now 9)")


def test_the_limit_of_the_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd, "available_bytes", lambda: memfd.HEADROOM_BYTES + 4096)
    os.close(create_memfd("test", 4096, ""))
    with pytest.raises(ConfigError):
        create_memfd("test", 4097, "")
