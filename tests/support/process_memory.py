"""The KV pool of a running engine, written to from outside: what its owner, or a fault, would write there.

The pool's descriptor gives nobody else a writable mapping (it is sealed), so it goes through /proc/PID/mem, which
the kernel allows for one's own descendants, or for root.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvrelay_transfer.fence import WORD_BYTES
from kvrelay_transfer.region import RegionHeader

POOL_NAME = "memfd:kvrelay-pool"
HEADER_BYTES = 4096


class OpenPool:
    def __init__(self, memory: int, address: int) -> None:
        self._memory = memory
        self._address = address
        self._header = RegionHeader.unpack(os.pread(memory, HEADER_BYTES, address))

    @property
    def words(self) -> tuple[int, ...]:
        """[num_blocks], the null block's included."""
        data = os.pread(self._memory, self._header.num_blocks * WORD_BYTES, self._words_address)
        return struct.unpack(f"<{self._header.num_blocks}Q", data)

    def write_words(self, words: tuple[int, ...]) -> None:
        assert len(words) == self._header.num_blocks
        self._write(struct.pack(f"<{len(words)}Q", *words), self._words_address)

    def overwrite_blocks(self) -> None:
        """Every block but the null block gets bytes that no prompt's KV has."""
        data = b"\x7b" * self._header.block_bytes
        for block in range(1, self._header.num_blocks):
            self._write(data, self._address + self._header.data_offset + block * len(data))

    @property
    def _words_address(self) -> int:
        return self._address + self._header.words_offset

    def _write(self, data: bytes, address: int) -> None:
        assert os.pwrite(self._memory, data, address) == len(data)


@contextmanager
def open_pool(pid: int) -> Iterator[OpenPool]:
    """Of the engine process `pid`. Skips the test where the system does not let us."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
    except PermissionError as error:
        pytest.skip(f"this system does not let us write to the memory of our own descendants: {error}")
    try:
        yield OpenPool(memory, own_pool_address(pid))
    finally:
        os.close(memory)


def own_pool_address(pid: int) -> int:
    """Of the one mapping that may be written to; those of peers may only be read."""
    [address] = [address for address, permissions in pool_mappings(pid) if "w" in permissions]
    return address


def pool_mappings(pid: int) -> list[tuple[int, str]]:
    """(address, permissions) of every KV pool that the process has mapped, whole or the start of it."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, permissions, offset, *_ = line.split()
        if POOL_NAME in line and int(offset, 16) == 0:
            found.append((int(addresses.partition("-")[0], 16), permissions))
    return found
