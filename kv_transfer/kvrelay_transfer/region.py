"""The shared segment of a pool, as its owner lays it out and as a peer maps it.

    header (one page) | fence words (u64 per block) | data (page-aligned; block i at data + i * block_bytes)

The segment of a GPU pool has no data part. Peers map it read-only, which the owner's seals enforce. Torch-free.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import NamedTuple

import numpy as np

from kvrelay_core.errors import MismatchError, TransferError
from kvrelay_transfer.embedding_layout import PoolLayout
from kvrelay_transfer.fence import WORD_BYTES, RemoteWords
from kvrelay_transfer.memfd import is_sealed
from kvrelay_transfer.slice_copy import BlockBytes

MAGIC = b"KVRELAY\0"
VERSION = 1
EPOCH_BYTES = 16
_HEADER = struct.Struct("<8sIIQQQQ16s32s")


def _page_aligned(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class RegionHeader(NamedTuple):
    num_blocks: int
    block_bytes: int
    words_offset: int
    data_offset: int
    has_data: bool
    engine_epoch: bytes
    layout_fingerprint: bytes

    @classmethod
    def plan(cls, layout: PoolLayout, num_blocks: int, engine_epoch: bytes, *, has_data: bool) -> RegionHeader:
        assert len(engine_epoch) == EPOCH_BYTES, "an engine epoch has 128 bits"
        words_offset = mmap.PAGESIZE
        data_offset = words_offset + _page_aligned(num_blocks * WORD_BYTES)
        fingerprint = layout.fingerprint()
        return cls(num_blocks, layout.block_bytes, words_offset, data_offset, has_data, engine_epoch, fingerprint)

    @property
    def size_bytes(self) -> int:
        data_bytes = self.num_blocks * self.block_bytes if self.has_data else 0
        return self.data_offset + _page_aligned(data_bytes)

    def pack(self) -> bytes:
        numbers = (self.num_blocks, self.block_bytes, self.words_offset, self.data_offset)
        return _HEADER.pack(MAGIC, VERSION, self.has_data, *numbers, self.engine_epoch, self.layout_fingerprint)

    @classmethod
    def unpack(cls, data: bytes) -> RegionHeader:
        magic, version, has_data, *fields = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise MismatchError("the peer's segment is not a KV pool of this version; run one version on one host")
        num_blocks, block_bytes, words_offset, data_offset, epoch, fingerprint = fields
        return cls(num_blocks, block_bytes, words_offset, data_offset, bool(has_data), epoch, fingerprint)


class RemoteRegion:
    """A peer's segment, mapped read-only. Outlives the peer; closing it is up to us."""

    def __init__(self, mapping: mmap.mmap, header: RegionHeader) -> None:
        self._mapping = mapping
        self.header = header
        bytes_view = np.frombuffer(mapping, np.uint8)
        self._address = int(bytes_view.ctypes.data)
        self.words = RemoteWords(np.frombuffer(mapping, np.uint64, header.num_blocks, header.words_offset))

    @classmethod
    def attach(cls, fd: int, layout: PoolLayout, engine_epoch: bytes) -> RemoteRegion:
        """Maps the segment behind `fd`, which stays the caller's. `layout` is what the peer says of its pool.

        Raises MismatchError (other layout), TransferError (other engine start, or memory that could vanish).
        """
        if not is_sealed(fd):
            raise TransferError("the peer's segment is not sealed; its owner could take it away under a read")
        size_bytes = os.fstat(fd).st_size
        if size_bytes < mmap.PAGESIZE:
            raise TransferError("the peer's segment is too small to be a KV pool")
        mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        try:
            header = RegionHeader.unpack(mapping[: _HEADER.size])
            cls._check(header, layout, engine_epoch, size_bytes)
        except Exception:
            mapping.close()
            raise
        return cls(mapping, header)

    @staticmethod
    def _check(header: RegionHeader, layout: PoolLayout, engine_epoch: bytes, size_bytes: int) -> None:
        if header.layout_fingerprint != layout.fingerprint():
            raise MismatchError("the peer's segment holds KV of another layout than the peer says")
        if header.engine_epoch != engine_epoch:
            raise TransferError("the peer's segment is of another engine start; connect again")
        planned = RegionHeader.plan(layout, header.num_blocks, engine_epoch, has_data=header.has_data)
        if header != planned or header.size_bytes != size_bytes:
            raise TransferError("the peer's segment contradicts its own header")

    def block_address(self, block: int) -> int:
        return self._address + self.header.data_offset + block * self.header.block_bytes

    @property
    def host_blocks(self) -> BlockBytes:
        """All blocks, read-only. Let go of it before `close`."""
        data = np.frombuffer(self._mapping, np.uint8, self.data_bytes, self.header.data_offset)
        return BlockBytes(data, self.header.block_bytes)

    @property
    def data_bytes(self) -> int:
        return self.header.num_blocks * self.header.block_bytes if self.header.has_data else 0

    def close(self) -> None:
        """No copy may be under way."""
        del self.words
        self._mapping.close()
