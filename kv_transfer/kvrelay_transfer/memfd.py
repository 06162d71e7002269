"""Anonymous shared memory that is reserved fully and sealed: what pools and staging rings lie in (PROTOCOL E2).

The kernel frees it with its last holder, so nothing is left to unlink after a crash. Knows no layout.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from kvrelay_core.errors import ConfigError

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


def available_bytes() -> int:
    """Memory that can be reserved now: of the machine, and within the limit of our control group."""
    return min(_machine_available_bytes(), *_cgroup_available_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _shortage(name: str, size_bytes: int, free_bytes: int, advice: str) -> ConfigError:
    return ConfigError(
        f"{name} needs {size_bytes / GIB:.2f} GiB of memory, {max(0, free_bytes - HEADROOM_BYTES) / GIB:.2f} GiB "
        f"are free; {advice}",
        needed_bytes=size_bytes,
        free_bytes=free_bytes,
    )


def _machine_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available_bytes(membership: Path, mount: Path) -> list[int]:
    """Headroom under each memory limit (cgroup v2) from our own group up to the root."""
    headrooms: list[int] = []
    for line in membership.read_text().splitlines() if membership.exists() else ():
        hierarchy, _, path = line.split(":", 2)
        if hierarchy != "0":
            continue
        group = mount / path.strip("/")
        while True:
            headrooms += _group_headroom(group)
            if group == mount or mount not in group.parents:
                break
            group = group.parent
    return headrooms or [2**63]


def _group_headroom(group: Path) -> list[int]:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # the root group, or no memory controller
        return []
    if limit == "max":
        return []
    reclaimable = int(stat.get("inactive_file", 0))
    return [max(0, int(limit) - used + reclaimable)]
