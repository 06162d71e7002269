"""Anonymous shared memory that is reserved fully and sealed: what pools and staging rings lie in (PROTOCOL E2).

The kernel frees it with its last holder, so nothing is left to unlink after a crash. Knows no layout.
"""

from __future__ import annotations

import fcntl
import os

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.host_memory import available_bytes

# <linux/fcntl.h>; Python 3.11's fcntl module lacks FUTURE_WRITE.
SEAL_SHRINK = 0x0002
SEAL_GROW = 0x0004
SEAL_FUTURE_WRITE = 0x0010

GIB = 1 << 30
# Left to the rest of the process when a segment is reserved.
HEADROOM_BYTES = 128 << 20


def create_memfd(name: str, size_bytes: int, advice: str) -> int:
    """A new descriptor of `size_bytes` of zeroed memory, all of it reserved now.

    Raises ConfigError, ending with `advice`, when memory is short: without the check the kernel would kill the
    process while it reserves.
    """
    free_bytes = available_bytes()
    if size_bytes + HEADROOM_BYTES > free_bytes:
        raise _shortage(name, size_bytes, free_bytes, advice)
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        os.close(fd)
        raise _shortage(name, size_bytes, free_bytes, advice) from error
    return fd


def seal(fd: int, *, future_writes: bool) -> None:
    """Fixes the size for good; with `future_writes` False nobody but today's mappings can write."""
    seals = SEAL_SHRINK | SEAL_GROW | (0 if future_writes else SEAL_FUTURE_WRITE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def is_sealed(fd: int) -> bool:
    """Whether no holder can shrink it, so that a mapping never faults."""
    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEAL_SHRINK)


def _shortage(name: str, size_bytes: int, free_bytes: int, advice: str) -> ConfigError:
    return ConfigError(
        f"{name} needs {size_bytes / GIB:.2f} GiB of memory, {max(0, free_bytes - HEADROOM_BYTES) / GIB:.2f} GiB "
        f"are free; {advice}",
        needed_bytes=size_bytes,
        free_bytes=free_bytes,
    )
