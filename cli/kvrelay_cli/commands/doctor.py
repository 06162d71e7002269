"""`kvrelay doctor`: what this machine can do, as a table. Changes nothing and needs no model."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvrelay_core.errors import ConfigError, KvRelayError

EPILOG = """\
Each line says `ok`, `--` (not there, and not needed) or `BAD` (something will not work). Exit code 2 with a BAD line.
GB/s are 10^9 bytes a second; `first` is the first copy, which touches every page, `then` the best of later ones.

example:
  kvrelay doctor
"""

GIB = 2**30
Line = tuple[str, str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurements (about 2 seconds)")


def run(args: argparse.Namespace) -> int:
    lines: list[Line] = []
    for line in _findings(measure=not args.no_speed):
        lines.append(line)
        print("{:<4} {:<22} {}".format(*line), flush=True)
    bad = [name for verdict, name, _ in lines if verdict == "BAD"]
    if bad:
        raise ConfigError(f"this machine has problems: {', '.join(bad)}")
    return 0


def _findings(*, measure: bool) -> Iterator[Line]:
    yield from _machine()
    yield from _torch()
    yield from _shared_memory()
    yield _run_directory()
    yield from _speeds() if measure else ()


def _machine() -> Iterator[Line]:
    cores = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield ("ok" if platform.system() == "Linux" else "BAD"), "system", f"{system}, Python {platform.python_version()}"
    yield "ok", "CPU cores", str(cores)
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo")}
    available, total = memory["MemAvailable"] / GIB, memory["MemTotal"] / GIB
    yield ("ok" if available > 1 else "BAD"), "memory", f"{available:.1f} of {total:.1f} GiB available"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _torch() -> Iterator[Line]:
    if importlib.util.find_spec("torch") is None:
        yield "--", "torch", "not installed: this machine can run a router, no workers; pip install 'kvrelay[engine]'"
        return
    import torch

    yield "ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield "ok", f"cuda:{index}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    elif shutil.which("nvidia-smi"):
        yield "BAD", "cuda", f"a driver is installed, but torch {torch.__version__} cannot use it"
    else:
        yield "--", "cuda", "no NVIDIA driver; --device cpu works"


def _shared_memory() -> Iterator[Line]:
    try:
        from kvrelay_transfer.memfd import create_memfd, is_sealed, seal

        fd = create_memfd("kvrelay-doctor", 1 << 20, "free some memory")
        try:
            seal(fd, future_writes=False)
            yield ("ok" if is_sealed(fd) else "BAD"), "memfd and seals", "KV pools can be shared without a file"
        finally:
            os.close(fd)
    except (KvRelayError, OSError) as error:
        yield "BAD", "memfd and seals", str(error)
    if Path("/dev/shm").is_dir():
        yield "ok", "/dev/shm", f"{shutil.disk_usage('/dev/shm').free / GIB:.1f} GiB free (not used: pools are memfds)"
    else:
        yield "--", "/dev/shm", "not mounted (not used: pools are memfds)"


def _run_directory() -> Line:
    """Sockets of the roles live below the temporary folder; their paths must fit a socket address."""
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryDirectory(prefix="kvrelay-up-") as path:
            mode = stat.S_IMODE(Path(path).stat().st_mode)
            if len(path) > 60:
                return "BAD", "run folder", f"{folder} is too long for socket paths; set TMPDIR to a shorter one"
            return ("ok" if mode == 0o700 else "BAD"), "run folder", f"{folder}, made with mode {mode:04o}"
    except OSError as error:
        return "BAD", "run folder", f"cannot write to {folder}: {error.strerror}; set TMPDIR"


def _speeds() -> Iterator[Line]:
    if importlib.util.find_spec("torch") is None:
        return
    from kvrelay_cli import probes

    shm, size_bytes = probes.probe_shm()
    for name, speed in (
        ("memcpy", probes.probe_memcpy(size_bytes)),
        ("connector shm", shm),
        ("connector grpc", probes.probe_grpc(size_bytes)),
    ):
        yield "ok", name, f"{speed.first_gb_per_s:5.1f} GB/s first, {speed.gb_per_s:5.1f} GB/s then"
