"""What the machine itself offers: system, memory and its limits, shared memory, the folder for sockets. No torch."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvrelay_cli.finding import Finding, absent, bad, ok
from kvrelay_core.errors import KvRelayError
from kvrelay_transfer.host_memory import available_bytes, total_bytes
from kvrelay_transfer.memfd import create_memfd, is_sealed, seal

GIB = 2**30
MIN_AVAILABLE_BYTES = GIB
MAX_RUN_FOLDER_CHARACTERS = 60


def look_at_machine() -> Iterator[Finding]:
    yield _system()
    if not is_linux():
        return
    yield _cores()
    yield memory(available_bytes(), total_bytes(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    yield memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield memfd()
    yield dev_shm(Path("/dev/shm"))
    yield run_directory()


def is_linux() -> bool:
    """Whether a worker can run here at all."""
    return platform.system() == "Linux"


def _system() -> Finding:
    text = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    return ok("system", text) if is_linux() else bad("system", f"{text}; workers need Linux")


def _cores() -> Finding:
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    busy = "; the machine is busy, so what is measured here is too low" if load > cores else ""
    return ok("CPU cores", f"{cores}, load {load:.1f}{busy}")


def memory(free_bytes: int, limit_bytes: int, machine_bytes: int) -> Finding:
    text = f"{free_bytes / GIB:.1f} of {limit_bytes / GIB:.1f} GiB available"
    if limit_bytes < machine_bytes:
        text += f" (a control group's limit; the machine has {machine_bytes / GIB:.1f})"
    return ok("memory", text) if free_bytes > MIN_AVAILABLE_BYTES else bad("memory", text)


def memlock(limit_bytes: int) -> Finding:
    if limit_bytes == resource.RLIM_INFINITY:
        return ok("lockable memory", "unlimited")
    text = f"{limit_bytes / 2**20:.1f} MiB; only a network card that reads pools (RDMA) needs more: ulimit -l unlimited"
    return absent("lockable memory", text)


def memfd() -> Finding:
    try:
        fd = create_memfd("kvrelay-doctor", 1 << 20, "free some memory")
        try:
            seal(fd, future_writes=False)
            if is_sealed(fd):
                return ok("memfd and seals", "KV pools can be shared without a file")
            return bad("memfd and seals", "the kernel did not keep the seals")
        finally:
            os.close(fd)
    except (KvRelayError, OSError) as error:
        return bad("memfd and seals", str(error))


def dev_shm(folder: Path) -> Finding:
    """Said because people who know other engines look for it: its size limits nothing here."""
    if folder.is_dir():
        free = shutil.disk_usage(folder).free / GIB
        return ok(str(folder), f"{free:.1f} GiB free (not used: pools are memfds, which its size does not limit)")
    return absent(str(folder), "not mounted (not used: pools are memfds)")


def run_directory() -> Finding:
    """Sockets of the roles live below the temporary folder; their paths must fit a socket address."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryDirectory(prefix="kvrelay-up-") as path:
            mode = stat.S_IMODE(Path(path).stat().st_mode)
            if len(path) > MAX_RUN_FOLDER_CHARACTERS:
                return bad("run folder", f"{folder} is too long for socket paths; set TMPDIR to a shorter one")
            text = f"{folder}, made with mode {mode:04o}"
            return ok("run folder", text) if mode == 0o700 else bad("run folder", text)
    except OSError as error:
        return bad("run folder", f"cannot write to {folder}: {error.strerror}; set TMPDIR")
