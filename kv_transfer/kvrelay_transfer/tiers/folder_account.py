"""How much lies in a folder that several processes write to: a small file that one of them at a time holds.

The file system is the truth; this saves walking through it for every part. The lock is flock's, so it ends with the
process that has it. Knows nothing of what is in the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvrelay_transfer.tiers.part_store import StoreError

_FIELDS = struct.Struct("<8sQQ")
_MAGIC = b"KVRACCT\1"
_RETRY_S = 1e-3


@dataclass
class Account:
    """What is in the folder, as far as is known."""

    is_known: bool = False  # False: nobody has counted yet
    num_parts: int = 0
    used_bytes: int = 0

    def add(self, parts: int, size_bytes: int) -> None:
        """What others removed behind our back may be taken off twice, until somebody counts again."""
        self.num_parts = max(0, self.num_parts + parts)
        self.used_bytes = max(0, self.used_bytes + size_bytes)


class FolderAccount:
    """Of the folder that `path` is in."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        """Raises OSError where the file cannot be had."""
        self._path = path
        self._timeout_s = timeout_s
        self._mutex = threading.Lock()  # flock is per open file, so not between our threads
        self._fd = self._open()

    @contextlib.contextmanager
    def held(self) -> Iterator[Account]:
        """The account, ours alone; changes of it count from the end of the block on. Raises StoreError when others
        do not let go of it in time, and OSError."""
        if not self._mutex.acquire(timeout=self._timeout_s):
            raise StoreError(f"{self._path} was not to be had within {self._timeout_s:g} s")
        try:
            if self._fd < 0:
                raise StoreError(f"{self._path} is closed")
            self._lock()
            try:
                account = self.read()
                try:
                    yield account
                finally:
                    self._write(account)
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._mutex.release()

    def read(self) -> Account:
        """As it was a moment ago, for who does not hold it."""
        found = os.pread(self._fd, _FIELDS.size, 0)
        if len(found) < _FIELDS.size:
            return Account()
        magic, num_parts, used_bytes = _FIELDS.unpack(found)
        return Account(True, num_parts, used_bytes) if magic == _MAGIC else Account()

    def close(self) -> None:
        """Waits for who holds it."""
        with self._mutex:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _write(self, account: Account) -> None:
        if account.is_known:
            os.pwrite(self._fd, _FIELDS.pack(_MAGIC, account.num_parts, account.used_bytes), 0)

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _lock(self) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        while not self._try_lock():
            if time.monotonic() > deadline_s:
                raise StoreError(f"another process holds {self._path} for longer than {self._timeout_s:g} s")
            time.sleep(_RETRY_S)

    def _try_lock(self) -> bool:
        """Of the file that is there now: somebody may have emptied the folder."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if os.fstat(self._fd).st_nlink:
            return True
        again = self._open()
        os.dup2(again, self._fd, inheritable=False)  # at once, for who reads it meanwhile
        os.close(again)
        return False
