"""How much memory this process may have: of the machine, within every limit of its control groups.

Knows nothing of what it is wanted for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """What can be reserved now."""
    return min(_meminfo_bytes("MemAvailable", "SC_AVPHYS_PAGES"), *_headrooms(_MEMBERSHIP, _MOUNT))


def total_bytes() -> int:
    """What there is, whoever uses it now: the machine's memory, or the least limit above us."""
    return min(_meminfo_bytes("MemTotal", "SC_PHYS_PAGES"), *_limits(_MEMBERSHIP, _MOUNT))


def _meminfo_bytes(field: str, fallback: str) -> int:
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return os.sysconf(fallback) * os.sysconf("SC_PAGE_SIZE")


def _headrooms(membership: Path, mount: Path) -> list[int]:
    """What each limited group has left, what it can drop included; no limit is a very large one."""
    found = []
    for group, limit in _limited_groups(membership, mount):
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(max(0, limit - used + int(stat.get("inactive_file", 0))))
    return found or [2**63]


def _limits(membership: Path, mount: Path) -> list[int]:
    return [limit for _, limit in _limited_groups(membership, mount)] or [2**63]


def _limited_groups(membership: Path, mount: Path) -> Iterator[tuple[Path, int]]:
    """The groups (cgroup v2) with a memory limit, from our own up to the root."""
    for line in membership.read_text().splitlines() if membership.exists() else ():
        hierarchy, _, path = line.split(":", 2)
        if hierarchy != "0":
            continue
        group = mount / path.strip("/")
        while True:
            limit_file = group / "memory.max"
            limit = limit_file.read_text().strip() if limit_file.exists() else "max"
            if limit != "max":
                yield group, int(limit)
            if group == mount or mount not in group.parents:
                break
            group = group.parent
