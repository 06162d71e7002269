"""What the system knows of processes: their descendants, command lines, CPU time. Linux's /proc, nothing else."""

from __future__ import annotations

import os
from pathlib import Path


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    return _stat(pid) is not None and _stat(pid)[0] != "Z"  # type: ignore[index]


def state_of(pid: int) -> str | None:
    """R running, S sleeping, T stopped, Z zombie, ...; None when it is gone."""
    fields = _stat(pid)
    return None if fields is None else fields[0]


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def descendants(pid: int) -> list[int]:
    """Children, their children and so on that are alive now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        fields = _stat(int(entry)) if entry.isdigit() else None
        if fields is not None and fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    queue = [pid]
    while queue:
        queue += (below := children.get(queue.pop(), []))
        found += below
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a living process, all its threads."""
    fields = _stat(pid)
    assert fields is not None, f"process {pid} is gone"
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name: state, ppid, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
