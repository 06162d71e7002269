"""Parts in Redis: one server, a master behind Sentinels, or a cluster. Shared by all workers that use it.

Redis bounds itself, by `maxmemory` and its policy; parts expire `ttl_s` after they were last written. Of several
servers each thread talks to one at a time. Knows no workers and no records.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from kvrelay_transfer.tiers.part_key import PREFIX, PartKey, parse_key
from kvrelay_transfer.tiers.part_store import PartStore, StoreError, StoreUsage
from kvrelay_transfer.tiers.redis_connections import RedisConnections
from kvrelay_transfer.tiers.redis_places import places_of
from kvrelay_transfer.tiers.redis_streams import StreamError
from kvrelay_transfer.tiers.redis_targets import Address, RedisTarget
from kvrelay_transfer.tiers.redis_wire import RedisWire, RefusedError, Reply

T = TypeVar("T")

DAY_S = 86_400
_SCAN_COUNT = b"1000"
_ELSEWHERE = ("MOVED", "ASK")
_NOT_THE_MASTER = ("READONLY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN")


class RedisStore(PartStore):
    """`timeout_s` bounds each command, and each step of connecting. Connects when it is first needed.

    A slot of a cluster that moved is a miss, after which the slots are asked for anew.
    """

    name = "redis"
    num_readers = 4
    num_writers = 2

    def __init__(self, target: RedisTarget, *, ttl_s: int = DAY_S, timeout_s: float = 2.0) -> None:
        self._target = target
        self._ttl_s = ttl_s
        self._connections = RedisConnections(target.login, timeout_s)
        self._places = places_of(target, timeout_s)
        self._lock = threading.Lock()
        self._num_moved = 0
        self._is_closed = False

    @property
    def num_moved(self) -> int:
        """Calls that were sent to a server that did not have the slot (any more)."""
        return self._num_moved

    def count_prefix(self, keys: Sequence[PartKey]) -> int:
        texts = [key.text.encode() for key in keys]
        by_server: dict[Address, list[int]] = {}
        with self._translated():
            for index, text in enumerate(texts):
                by_server.setdefault(self._places.of_key(text), []).append(index)
        first_missing = len(keys)
        for address, indices in by_server.items():
            wanted = [index for index in indices if index < first_missing]
            with self._asking(address) as wire:
                replies = wire.call_many([(b"EXISTS", texts[index]) for index in wanted])
                first_missing = next(
                    (index for index, reply in zip(wanted, replies, strict=False) if not self._is_one(reply)),
                    first_missing,
                )
        return first_missing

    def get(self, key: PartKey, into: memoryview) -> int | None:
        return self._at_key(key, lambda wire, text: wire.get(text, into), None)

    def put(self, key: PartKey, part: memoryview) -> bool:
        def store(wire: RedisWire, text: bytes) -> bool:
            try:
                wire.put(text, part, self._ttl_s)
            except RefusedError as error:
                if error.code != "OOM":
                    raise
                return False
            return True

        return self._at_key(key, store, False)

    def remove(self, key: PartKey) -> None:
        self._at_key(key, lambda wire, text: wire.call(b"UNLINK", text), None)

    def keys(self) -> Iterator[PartKey]:
        for address in self._all_servers():
            for page in self._pages(address):
                yield from filter(None, map(_part_key, page))

    def clear(self) -> int:
        num_removed = 0
        for address in self._all_servers():
            for page in self._pages(address):
                ours = [name for name in page if _part_key(name) is not None]
                with self._asking(address) as wire:
                    # One key a command: those of a cluster are of many slots.
                    num_removed += sum(map(self._is_one, wire.call_many([(b"UNLINK", name) for name in ours])))
        return num_removed

    def usage(self) -> StoreUsage:
        """Of the whole servers, and whatever else is in the database: cheap to ask, however many keys there are."""
        num_parts = used_bytes = capacity_bytes = 0
        for address in self._all_servers():
            with self._asking(address) as wire:
                num_keys, memory = wire.call(b"DBSIZE"), _fields(wire.call(b"INFO", b"memory"))
            num_parts += num_keys if isinstance(num_keys, int) else 0
            used_bytes += memory.get("used_memory", 0)
            capacity_bytes += memory.get("maxmemory", 0)
        return StoreUsage(num_parts, used_bytes, capacity_bytes)

    def close(self) -> None:
        self._is_closed = True
        self._connections.close()

    def _at_key(self, key: PartKey, call: Callable[[RedisWire, bytes], T], moved: T) -> T:
        """What `call` says at the server that has the key; `moved` when that is another one now."""
        text = key.text.encode()
        with self._translated():
            address = self._places.of_key(text)
        with self._asking(address) as wire:
            try:
                return call(wire, text)
            except RefusedError as error:
                if not self._has_moved(error):
                    raise
                return moved

    def _is_one(self, reply: Reply) -> bool:
        """Of a command that counts one key. Raises RefusedError."""
        if isinstance(reply, RefusedError):
            if self._has_moved(reply):
                return False
            raise reply
        return reply == 1

    def _has_moved(self, error: RefusedError) -> bool:
        """Also remembers it."""
        if error.code not in _ELSEWHERE:
            return False
        with self._lock:
            self._num_moved += 1
        if error.code == "MOVED":  # for good: ASK is for a slot that is on its way
            self._places.forget()
        return True

    def _all_servers(self) -> list[Address]:
        with self._translated():
            return self._places.all()

    def _pages(self, address: Address) -> Iterator[list[bytes]]:
        """The names of keys that start as ours do; one may come twice."""
        cursor = b"0"
        while True:
            with self._asking(address) as wire:
                reply = wire.call(b"SCAN", cursor, b"MATCH", PREFIX.encode() + b":*", b"COUNT", _SCAN_COUNT)
            match reply:
                case [bytes(cursor), list(names)]:
                    yield [name for name in names if isinstance(name, bytes)]
                case _:
                    raise StoreError(f"{self._target}: cannot read the answer to SCAN: is this a Redis server?")
            if cursor == b"0":
                return

    @contextmanager
    def _asking(self, address: Address) -> Iterator[RedisWire]:
        """A connection to the server. What goes wrong there is StoreError."""
        with self._translated(address):
            with self._connections.borrow(address) as wire:
                yield wire

    @contextmanager
    def _translated(self, address: Address | None = None) -> Iterator[None]:
        if self._is_closed:
            raise StoreError(f"{self._target}: closed")
        try:
            yield
        except RefusedError as error:
            if error.code in _NOT_THE_MASTER:
                self._leave(address)
            raise StoreError(f"{self._target}: {error}") from error
        except StreamError as error:
            self._leave(address)
            raise StoreError(f"{self._target}: {error}") from error

    def _leave(self, address: Address | None) -> None:
        """That server may be the wrong one, or gone with all connections."""
        self._places.forget()
        if address is not None:
            self._connections.drop_idle(address)


def _part_key(name: bytes) -> PartKey | None:
    return parse_key(name.decode(errors="replace"))


def _fields(info: Reply) -> dict[str, int]:
    """The numbers that INFO says."""
    lines = (info if isinstance(info, bytes) else b"").decode(errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name: int(value) for name, _, value in pairs if value.isdigit()}
