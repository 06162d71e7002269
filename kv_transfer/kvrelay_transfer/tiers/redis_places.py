"""Which server has a key: always the same one, the master that Sentinels name, or the owner of the key's slot.

What was learnt holds until `forget`, which whoever was sent elsewhere or found nobody there calls. Moves no parts.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from redis.crc import key_slot

from kvrelay_transfer.tiers.redis_connections import open_wire
from kvrelay_transfer.tiers.redis_streams import StreamError
from kvrelay_transfer.tiers.redis_targets import Address, RedisKind, RedisLogin, RedisTarget
from kvrelay_transfer.tiers.redis_wire import RedisWire, RefusedError

T = TypeVar("T")


class RedisPlaces(ABC):
    """Thread-safe. Raises StreamError where nobody tells."""

    @abstractmethod
    def of_key(self, key: bytes) -> Address: ...

    @abstractmethod
    def all(self) -> list[Address]:
        """Every server that has keys."""

    @abstractmethod
    def forget(self) -> None:
        """The next call asks anew."""


class OneServer(RedisPlaces):
    def __init__(self, address: Address) -> None:
        self._address = address

    def of_key(self, key: bytes) -> Address:
        return self._address

    def all(self) -> list[Address]:
        return [self._address]

    def forget(self) -> None:
        pass


class _Learnt(Generic[T]):
    """What the first of several servers that knows it says. Threads that need it at the same time ask once, and fail
    once, together."""

    def __init__(
        self,
        addresses: tuple[Address, ...],
        login: RedisLogin,
        ask: Callable[[RedisWire, Address], T],
        timeout_s: float,
    ) -> None:
        self._addresses = list(addresses)
        self._login = login
        self._ask = ask
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._known: T | None = None
        self._num_failures = 0

    def get(self) -> T:
        known, num_failures = self._known, self._num_failures
        if known is not None:
            return known
        with self._lock:
            if self._known is None:
                if self._num_failures != num_failures:
                    raise StreamError("nobody who could tell where the keys are answered another thread")
                self._known = self._ask_each()
            return self._known

    def forget(self) -> None:
        self._known = None

    def _ask_each(self) -> T:
        problems: list[str] = []
        for address in list(self._addresses):
            try:
                wire = open_wire(address, self._login, self._timeout_s)
                try:
                    return self._ask(wire, address)
                finally:
                    wire.close()
            except (StreamError, RefusedError) as error:
                problems.append(f"{address}: {error}")
                self._addresses.remove(address)  # asked last from now on
                self._addresses.append(address)
        self._num_failures += 1
        raise StreamError(f"nobody tells where the keys are: {'; '.join(problems)}")


class SentinelMaster(RedisPlaces):
    def __init__(self, target: RedisTarget, timeout_s: float) -> None:
        def ask(wire: RedisWire, address: Address) -> Address:
            return _master_of(wire, target.service)

        self._learnt = _Learnt(target.addresses, target.sentinel_login, ask, timeout_s)

    def of_key(self, key: bytes) -> Address:
        return self._learnt.get()

    def all(self) -> list[Address]:
        return [self._learnt.get()]

    def forget(self) -> None:
        self._learnt.forget()


class SlotRange(NamedTuple):
    first: int
    last: int
    owner: Address


class ClusterSlots(RedisPlaces):
    def __init__(self, target: RedisTarget, timeout_s: float) -> None:
        self._learnt = _Learnt(target.addresses, target.login, _slots_of, timeout_s)

    def of_key(self, key: bytes) -> Address:
        slot, ranges = key_slot(key), self._learnt.get()
        at = bisect_right(ranges, slot, key=lambda range: range.first) - 1
        if at < 0 or slot > ranges[at].last:
            self.forget()
            raise StreamError(f"no server of the cluster has slot {slot}")
        return ranges[at].owner

    def all(self) -> list[Address]:
        return list(dict.fromkeys(range.owner for range in self._learnt.get()))

    def forget(self) -> None:
        self._learnt.forget()


def places_of(target: RedisTarget, timeout_s: float) -> RedisPlaces:
    """`timeout_s` is for each step of asking one server."""
    if target.kind is RedisKind.SENTINEL:
        return SentinelMaster(target, timeout_s)
    if target.kind is RedisKind.CLUSTER:
        return ClusterSlots(target, timeout_s)
    return OneServer(target.addresses[0])


def _master_of(sentinel: RedisWire, service: str) -> Address:
    match sentinel.call(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", service.encode()):
        case [bytes(host), bytes(port)]:
            return Address(host.decode(), int(port))
    raise StreamError(f"watches no service named {service!r}")


def _slots_of(node: RedisWire, address: Address) -> list[SlotRange]:
    """A server that does not know its own host leaves it out: then it is the one that was asked."""
    ranges = []
    reply = node.call(b"CLUSTER", b"SLOTS")
    for each in reply if isinstance(reply, list) else []:
        match each:
            case [int(first), int(last), [bytes() | None as host, int(port), *_], *_]:
                ranges.append(SlotRange(first, last, Address((host or b"").decode() or address.host, port)))
    if not ranges:
        raise StreamError("the cluster has no slots yet")
    return sorted(ranges)
