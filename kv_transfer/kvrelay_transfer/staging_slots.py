"""The staging ring between an engine and its service process: equal slots in one shared segment.

The engine creates it, the service opens it through /proc/<pid>/fd/<n>. The service decides who uses which slot;
the engine only copies into and out of the slots it is told. Torch-free: this is the side that services use.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

from kvrelay_core.errors import UnavailableError
from kvrelay_transfer.memfd import create_memfd, seal


class StagingSlots:
    def __init__(self, fd: int, num_slots: int, slot_bytes: int) -> None:
        """Use `create` or `open`. Takes over `fd`."""
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._fd = fd
        self._close_fd = weakref.finalize(self, os.close, fd)  # a descriptor is no more than a number
        self._mapping = mmap.mmap(fd, num_slots * slot_bytes)

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int) -> StagingSlots:
        """In the engine. Raises ConfigError when memory is short."""
        fd = create_memfd("kvrelay-staging", num_slots * slot_bytes, "use a smaller --block-tokens or model")
        seal(fd, future_writes=True)
        return cls(fd, num_slots, slot_bytes)

    @classmethod
    def open(cls, path: str | Path, num_slots: int, slot_bytes: int) -> StagingSlots:
        """In the service, with what `Started` told. Raises UnavailableError when the engine is gone."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise UnavailableError(f"the engine's staging ring cannot be opened at {path}: {error}") from error
        return cls(fd, num_slots, slot_bytes)

    @property
    def fd_path(self) -> str:
        """Where another process of this user can open it, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def slot(self, index: int) -> memoryview:
        """The bytes of one slot, writable. Release the view before `close`."""
        if not 0 <= index < self.num_slots:
            raise IndexError(f"the staging ring has slots 0..{self.num_slots - 1}, not {index}")
        return memoryview(self._mapping)[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def close(self) -> None:
        if self._close_fd.alive:
            self._close_fd()
            self._fd = -1
            self._mapping.close()
