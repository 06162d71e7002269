"""Host memory for parts: one span, cut into equal slots. Pinned where a GPU copies to and from it; else it is taken as
it is first written to, once there turned out to be so much at start.

Knows no keys and no owners (`host_store.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.host_memory import available_bytes
from kvrelay_transfer.tiers.part_format import HEADER_BYTES

_ALIGNMENT = 4096  # of slots: what direct I/O wants
GIB = 1 << 30


class HostSlab:
    """`slot(i)` is the memory of slot i [slot_bytes]: room for a header, then for a body."""

    def __init__(self, capacity_bytes: int, max_part_bytes: int, *, is_pinned: bool = False) -> None:
        """As many slots for bodies of `max_part_bytes` as fit, one at least. Raises ConfigError for want of memory."""
        self.is_pinned = is_pinned
        self.slot_bytes = -(-(HEADER_BYTES + max_part_bytes) // _ALIGNMENT) * _ALIGNMENT
        self.num_slots = max(1, capacity_bytes // self.slot_bytes)
        size_bytes = self.num_slots * self.slot_bytes
        if size_bytes > available_bytes():
            raise ConfigError(
                f"the host cache needs {size_bytes / GIB:.2f} GiB, {available_bytes() / GIB:.2f} GiB are free; "
                "lower --host-cache",
                needed_bytes=size_bytes,
            )
        mapping = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        if is_pinned:
            _pin(mapping)
        self._view = memoryview(mapping)

    def slot(self, index: int) -> memoryview:
        return self._view[index * self.slot_bytes : (index + 1) * self.slot_bytes]


def _pin(mapping: mmap.mmap) -> None:
    """Until the mapping is gone. Not by torch, which rounds what it pins up to a power of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    code = int(runtime.cudaHostRegister(address, len(mapping), 0))
    if code != 0:
        raise ConfigError(
            f"{len(mapping) / GIB:.2f} GiB of host cache cannot be pinned (CUDA error {code}); lower --host-cache"
        )
    unpin = weakref.finalize(mapping, runtime.cudaHostUnregister, address)
    unpin.atexit = False  # the driver does what a process leaves
