"""Parts on a local disk: one file for each, in a folder that all workers of a host may share.

    DIR/parts/<2 digits of the digest>/<text of the key>     a part; whoever can read it has it
    DIR/incoming/<pid>-<random>                              one that is being written, locked by its writer
    DIR/account                                              how much there is (`folder_account`)

The folder is the index: nothing else says what is here. A part is written under another name and renamed, so that a
process that dies leaves no torn part; what it leaves in `incoming` goes when a store next counts the folder. What a
dead machine leaves may be torn: nothing is synced, the part's checksum finds it.

The bound counts whole blocks of the disk and the parts that are being written, of all processes together; each keeps to
the bound that it was given. Least recently used is by mtime. Other files in DIR are never touched.

Parts go through the page cache: what was written lately comes back at the speed of memory, also after a restart, and
past it, with O_DIRECT, several readers were not faster (bench/tiers.py has both). Knows no bytes of a part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import os
import re
import secrets
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.tiers.folder_account import Account, FolderAccount
from kvrelay_transfer.tiers.part_key import PartKey, parse_key
from kvrelay_transfer.tiers.part_store import PartStore, StoreError, StoreUsage

_BLOCK_BYTES = 4096
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# So many of the oldest are remembered, so that a full folder is walked once for many parts.
_NUM_REMEMBERED = 4096
_INCOMING = re.compile(r"\d+-[0-9a-f]{16}")


class _File(NamedTuple):
    """Ordered by age."""

    mtime_ns: int
    path: str
    room_bytes: int


class DiskStore(PartStore):
    name = "disk"
    num_readers = 4
    num_writers = 2

    def __init__(self, folder: Path, capacity_bytes: int, lock_timeout_s: float = 5.0) -> None:
        """Raises ConfigError where the folder cannot be written to."""
        self._parts = os.path.abspath(folder / "parts")
        self._incoming = os.path.abspath(folder / "incoming")
        self._capacity_bytes = capacity_bytes
        self._oldest: deque[_File] = deque()  # whoever holds the account
        self._num_evicted = 0
        self._is_closed = False
        try:
            for path in (self._parts, self._incoming):
                os.makedirs(path, mode=0o700, exist_ok=True)
            self._account = FolderAccount(Path(os.path.abspath(folder / "account")), lock_timeout_s)
            with contextlib.ExitStack() as failing:
                failing.callback(self._account.close)
                with self._account.held() as account:
                    self._count(account)
                failing.pop_all()
        except (OSError, StoreError) as error:
            raise ConfigError(
                f"cannot keep parts in {folder}: {error}; give a folder that this user may write"
            ) from error

    def count_prefix(self, keys: Sequence[PartKey]) -> int:
        with self._own_trouble():
            return next((index for index, key in enumerate(keys) if not os.path.isfile(self._path(key))), len(keys))

    def get(self, key: PartKey, into: memoryview) -> int | None:
        with self._own_trouble():
            try:
                # Whatever else lies there under this name must neither hold us up nor lead us elsewhere.
                fd = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_size > len(into):
                    return None
                length = _read(fd, into[: found.st_size])
                with contextlib.suppress(OSError):  # a folder that became read-only can still be read
                    _touch(fd)
                return length
            finally:
                os.close(fd)

    def put(self, key: PartKey, part: memoryview) -> bool:
        with self._own_trouble():
            try:
                return self._put(self._path(key), part)
            except OSError as error:
                if error.errno not in _NO_SPACE:
                    raise
                self._make_space(_room(len(part)))
                return False

    def remove(self, key: PartKey) -> None:
        with self._own_trouble(), self._account.held() as account:
            self._unlink(account, self._path(key))

    def keys(self) -> Iterator[PartKey]:
        with self._own_trouble():
            for file in self._files():
                key = parse_key(os.path.basename(file.path))
                assert key is not None
                yield key

    def clear(self) -> int:
        with self._own_trouble(), self._account.held() as account:
            num_removed = sum(self._unlink(account, file.path) for file in self._files())
            self._count(account)
            return num_removed

    def usage(self) -> StoreUsage:
        with self._own_trouble():
            account = self._account.read()
            return StoreUsage(account.num_parts, account.used_bytes, self._capacity_bytes, self._num_evicted)

    def close(self) -> None:
        self._is_closed = True
        self._account.close()

    @contextlib.contextmanager
    def _own_trouble(self) -> Iterator[None]:
        if self._is_closed:
            raise StoreError(f"{self.name} is closed")
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.name}: {error}") from error

    def _path(self, key: PartKey) -> str:
        return f"{self._parts}/{key.digest[:1].hex()}/{key.text}"

    def _files(self) -> Iterator[_File]:
        """All parts that are here."""
        for folder in _entries(self._parts):
            for entry in _entries(folder.path):
                if parse_key(entry.name) is not None and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield _File(found.st_mtime_ns, entry.path, _room(found.st_size))

    def _count(self, account: Account) -> None:
        """Makes the account true, and remembers who is the oldest."""
        account.is_known, account.num_parts, account.used_bytes = True, 0, self._sweep_incoming()

        def counted() -> Iterator[_File]:
            for file in self._files():
                account.add(1, file.room_bytes)
                yield file

        self._oldest = deque(heapq.nsmallest(_NUM_REMEMBERED, counted()))

    def _sweep_incoming(self) -> int:
        """Removes what dead writers left; returns what the others will need."""
        needed_bytes = 0
        for entry in filter(lambda entry: _INCOMING.fullmatch(entry.name), _entries(self._incoming)):
            with contextlib.suppress(FileNotFoundError):
                if _is_abandoned(entry.path):
                    os.unlink(entry.path)
                else:
                    needed_bytes += _room(entry.stat(follow_symlinks=False).st_size)
        return needed_bytes

    def _make_room(self, account: Account, room_bytes: int) -> bool:
        if room_bytes > self._capacity_bytes:
            return False
        if not account.is_known:
            self._count(account)
        return self._evict_until(account, lambda: account.used_bytes + room_bytes <= self._capacity_bytes)

    def _evict_until(self, account: Account, is_enough: Callable[[], bool]) -> bool:
        num_counts = 0
        while not is_enough():
            if self._oldest:
                self._evict(account, self._oldest.popleft())
            elif num_counts < 2:
                self._count(account)
                num_counts += 1
            else:
                return False
        return True

    def _evict(self, account: Account, file: _File) -> None:
        """Unless it was used since it was remembered, or is gone."""
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(file.path).st_mtime_ns == file.mtime_ns:
                self._num_evicted += self._unlink(account, file.path)

    def _unlink(self, account: Account, path: str) -> bool:
        try:
            room_bytes = _room(os.lstat(path).st_size)
            os.unlink(path)
        except FileNotFoundError:
            return False
        account.add(-1, -room_bytes)
        return True

    def _put(self, path: str, part: memoryview) -> bool:
        room_bytes = _room(len(part))
        with self._account.held() as account:
            if _touch_if_there(path):
                return True
            if not self._make_room(account, room_bytes):
                return False
            incoming, fd = self._create()
            account.add(0, room_bytes)
            try:
                os.ftruncate(fd, len(part))  # so that who counts sees what it will need
            except OSError:
                os.close(fd)
                self._withdraw(account, incoming, room_bytes)
                raise
        try:
            try:
                _write(fd, part)
            except OSError:
                with self._account.held() as account:
                    self._withdraw(account, incoming, room_bytes)
                raise
            self._publish(incoming, path, room_bytes)
        finally:
            os.close(fd)
        return True

    def _create(self) -> tuple[str, int]:
        """A new file in `incoming`, ours until its descriptor is closed."""
        path = f"{self._incoming}/{os.getpid()}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:  # somebody emptied the folder
            os.makedirs(self._incoming, mode=0o700, exist_ok=True)
            fd = os.open(path, flags, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path, fd

    def _publish(self, incoming: str, path: str, room_bytes: int) -> None:
        with self._account.held() as account:
            if _touch_if_there(path):  # another writer was faster
                self._withdraw(account, incoming, room_bytes)
                return
            try:
                os.rename(incoming, path)
            except FileNotFoundError:  # the first part of its folder
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                os.rename(incoming, path)
            account.add(1, 0)

    def _withdraw(self, account: Account, incoming: str, room_bytes: int) -> None:
        os.unlink(incoming)
        account.add(0, -room_bytes)

    def _make_space(self, room_bytes: int) -> None:
        """The disk is full, whatever our bound says: the next part is to find room, if anything here can make it."""
        with self._account.held() as account:
            enough_bytes = max(0, account.used_bytes - room_bytes)
            self._evict_until(account, lambda: account.used_bytes <= enough_bytes)


def _room(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _read(fd: int, into: memoryview) -> int:
    """Fewer bytes than wanted where the file became shorter."""
    os.posix_fadvise(fd, 0, len(into), os.POSIX_FADV_WILLNEED)
    length = 0
    while length < len(into):
        num_read = os.preadv(fd, [into[length:]], length)
        if not num_read:
            break
        length += num_read
    return length


def _write(fd: int, part: memoryview) -> None:
    """Into reserved space: several times as fast, and a full disk shows before anything is written."""
    os.posix_fallocate(fd, 0, len(part))
    written = 0
    while written < len(part):
        written += os.pwrite(fd, part[written:], written)
    _touch(fd)


def _touch(file: int | str) -> None:
    """By our clock: the kernel's own stamps are some milliseconds coarse."""
    now_ns = time.time_ns()
    os.utime(file, ns=(now_ns, now_ns))


def _touch_if_there(path: str) -> bool:
    try:
        _touch(path)
    except FileNotFoundError:
        return False
    return True


def _is_abandoned(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """None where there is no such folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries
