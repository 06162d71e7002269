"""Where `tiers.py` puts values: the stores, and beside each the least program that moves the same bytes.

A place is a `PartStore`, or looks like one to the bench.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kvrelay_transfer.tiers.disk_store import DiskStore
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.part_format import HEADER_BYTES
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import PartStore
from kvrelay_transfer.tiers.redis_store import RedisStore
from kvrelay_transfer.tiers.redis_targets import parse_redis_url


class Place(Protocol):
    def put(self, key: PartKey, part: memoryview) -> bool: ...

    def get(self, key: PartKey, into: memoryview) -> int | None: ...

    def clear(self) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """What places are made of; `room_bytes` is what a place has to hold."""

    folder: Path
    redis_port: int
    room_bytes: int
    value_bytes: int


class Memory:
    """A copy to or from a buffer of this process, in one call that lets other threads run."""

    def __init__(self, around: Surroundings) -> None:
        self._room = np.zeros((around.room_bytes // around.value_bytes, around.value_bytes), np.uint8)
        self._room[:] = 1  # all pages are there
        self._rows: dict[PartKey, int] = {}
        self._lock = threading.Lock()

    def put(self, key: PartKey, part: memoryview) -> bool:
        with self._lock:
            row = self._rows.setdefault(key, len(self._rows))
        np.copyto(self._room[row], np.frombuffer(part, np.uint8))
        return True

    def get(self, key: PartKey, into: memoryview) -> int | None:
        np.copyto(np.frombuffer(into, np.uint8), self._room[self._rows[key]])
        return len(into)

    def clear(self) -> int:
        self._rows.clear()
        return 0

    def close(self) -> None:
        pass


class Files:
    """A file for each value, written once and read once; nothing is looked up, renamed or counted."""

    def __init__(self, around: Surroundings, flags: int = 0) -> None:
        self._folder = around.folder / f"files-{flags}"
        self._folder.mkdir(exist_ok=True)
        self._flags = flags

    def put(self, key: PartKey, part: memoryview) -> bool:
        fd = os.open(self._path(key), os.O_WRONLY | os.O_CREAT | self._flags, 0o600)
        try:
            os.posix_fallocate(fd, 0, len(part))
            return os.pwrite(fd, part, 0) == len(part)
        finally:
            os.close(fd)

    def get(self, key: PartKey, into: memoryview) -> int | None:
        fd = os.open(self._path(key), os.O_RDONLY | self._flags)
        try:
            return os.preadv(fd, [into], 0)
        finally:
            os.close(fd)

    def clear(self) -> int:
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        return 0

    def close(self) -> None:
        self._folder.rmdir()

    def _path(self, key: PartKey) -> str:
        return f"{self._folder}/{key.text}"


def direct_files(around: Surroundings) -> Files:
    return Files(around, os.O_DIRECT)


class RawRedis:
    """A socket for each thread: the command, and the value straight into its place."""

    def __init__(self, around: Surroundings) -> None:
        self._port = around.redis_port
        self._local = threading.local()
        self._sockets: list[socket.socket] = []

    def put(self, key: PartKey, part: memoryview) -> bool:
        connection, name = self._connection(), key.text.encode()
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(part))
        connection.sendall(head)
        connection.sendall(part)
        connection.sendall(b"\r\n")
        return connection.recv(64) == b"+OK\r\n"

    def get(self, key: PartKey, into: memoryview) -> int | None:
        connection, name = self._connection(), key.text.encode()
        connection.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
        head = b""
        while not head.endswith(b"\r\n"):
            head += connection.recv(1)
        length = int(head[1:])
        view = into[:length]
        while len(view):
            view = view[connection.recv_into(view, 0, socket.MSG_WAITALL) :]
        connection.recv(2, socket.MSG_WAITALL)
        return length

    def clear(self) -> int:
        return flush(self._port)

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()

    def _connection(self) -> socket.socket:
        if not hasattr(self._local, "connection"):
            self._local.connection = socket.create_connection(("127.0.0.1", self._port), timeout=60)
            self._local.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._local.connection.settimeout(None)  # with one, MSG_WAITALL would not wait
            self._sockets.append(self._local.connection)
        found: socket.socket = self._local.connection
        return found


def host(around: Surroundings) -> HostStore:
    return HostStore(HostSlab(around.room_bytes, around.value_bytes - HEADER_BYTES))


def disk(around: Surroundings) -> DiskStore:
    return DiskStore(around.folder / "disk", around.room_bytes)


def redis(around: Surroundings) -> RedisStore:
    return RedisStore(parse_redis_url(f"redis://127.0.0.1:{around.redis_port}"), timeout_s=60)


STORES: dict[str, Callable[[Surroundings], PartStore]] = {"host": host, "disk": disk, "redis": redis}
# What the stores are compared with.
_DIRECT = "raw files, O_DIRECT"
RAW: dict[str, Callable[[Surroundings], Place]] = {
    "copy in memory": Memory,
    "raw files": Files,
    _DIRECT: direct_files,
    "raw redis client": RawRedis,
}


def is_on_disk(name: str) -> bool:
    return name == "disk" or "files" in name


def passes_by_memory(name: str) -> bool:
    """Its bytes are never in the page cache."""
    return name == _DIRECT


def make_cold(folder: Path) -> None:
    """Writes all that is dirty, and forgets what the page cache has of it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"FLUSHALL SYNC\r\n")
        assert connection.recv(64) == b"+OK\r\n"
    return 0


def redis_benchmark(port: int, operation: str, value_bytes: int, connections: int, num_values: int) -> float:
    """GB/s that `redis-benchmark` reaches. It reads and writes one key only."""
    words = f"redis-benchmark -p {port} -t {operation} -d {value_bytes} -c {connections} -n {num_values} --csv"
    done = subprocess.run(words.split(), capture_output=True, text=True, check=True)
    rates = re.findall(rf'^"{operation.upper()}","([0-9.]+)"', done.stdout, re.MULTILINE)
    assert len(rates) == 1, done.stdout
    return float(rates[0]) * value_bytes / 1e9
