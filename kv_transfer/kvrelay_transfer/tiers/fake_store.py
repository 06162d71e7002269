"""A store in memory that fails as it is told: the same keys fail the same way in every run, on every machine.

Which key meets which fault is drawn by a hash of the key, in the shares that are asked for; single keys can be told
their fault, too. Slow calls wait until they are released, or for as long as a slow store would.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum

from blake3 import blake3

from kvrelay_transfer.tiers.eviction import Eviction, Lru
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import PartStore, StoreError, StoreUsage


class Fault(Enum):
    """What happens to the calls that name a key."""

    ERROR = "error"  # each raises StoreError
    SLOW = "slow"  # get and put wait before they do what they should
    MISSING = "missing"  # counted as here, and not found by get
    TRUNCATED = "truncated"  # get gives the first half
    FLIPPED = "flipped"  # get gives one bit turned
    SWAPPED = "swapped"  # get gives another part that is here, if there is one
    TORN = "torn"  # put keeps the first half, and zeros for the rest
    FULL = "full"  # put has no room


class FakeStore(PartStore):
    """`capacity_bytes` 0 is no bound. `calls` counts the calls by name, those that failed included."""

    def __init__(
        self,
        faults: Mapping[Fault, float] | None = None,
        *,
        name: str = "fake",
        seed: int = 0,
        capacity_bytes: int = 0,
        delay_s: float = 0.5,
        eviction: Eviction[PartKey] | None = None,
    ) -> None:
        """`faults` are shares of all keys, together at most 1; `delay_s` is how long slow calls wait."""
        self.name = name
        self.calls: Counter[str] = Counter()
        self._seed = seed
        self._capacity_bytes = capacity_bytes
        self._delay_s = delay_s
        self._order: Eviction[PartKey] = eviction or Lru()
        self._parts: dict[PartKey, bytes] = {}
        self._used_bytes = 0
        self._num_evicted = 0
        self._told: dict[PartKey, Fault] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # slow calls wait for it
        self._num_waiting = 0
        self._num_releases = 0
        self._is_closed = False
        self.set_faults(faults or {})

    def set_faults(self, faults: Mapping[Fault, float]) -> None:
        """From now on, instead of those before; what single keys were told stays."""
        assert sum(faults.values()) <= 1 + 1e-9
        self._shares = dict(faults)

    def tell(self, key: PartKey, fault: Fault | None) -> None:
        """This key's fault, instead of what it draws; None: as drawn."""
        if fault is None:
            self._told.pop(key, None)
        else:
            self._told[key] = fault

    def fault_of(self, key: PartKey) -> Fault | None:
        if key in self._told:
            return self._told[key]
        drawn = _draw(self._seed, key) / 2**64
        for fault, share in self._shares.items():
            if drawn < share:
                return fault
            drawn -= share
        return None

    @property
    def num_waiting(self) -> int:
        """Slow calls that wait now."""
        return self._num_waiting

    def release(self) -> None:
        """The slow calls that wait now go on."""
        with self._lock:
            self._num_releases += 1
            self._changed.notify_all()

    def count_prefix(self, keys: Sequence[PartKey]) -> int:
        with self._lock:
            self._begin("count_prefix", *keys)
            return next((index for index, key in enumerate(keys) if key not in self._parts), len(keys))

    def get(self, key: PartKey, into: memoryview) -> int | None:
        with self._lock:
            self._begin("get", key)
            fault = self.fault_of(key)
            if fault is Fault.SLOW:
                self._wait()
            if key not in self._parts or fault is Fault.MISSING:
                return None
            self._order.touch(key)
            found = self._spoil(key, fault)
        if len(found) > len(into):
            return None
        into[: len(found)] = found
        return len(found)

    def put(self, key: PartKey, part: memoryview) -> bool:
        kept = bytes(part)
        with self._lock:
            self._begin("put", key)
            match self.fault_of(key):
                case Fault.SLOW:
                    self._wait()
                case Fault.FULL:
                    return False
                case Fault.TORN:
                    kept = kept[: len(kept) // 2].ljust(len(kept), b"\0")
            if key in self._parts:
                self._order.touch(key)
                return True
            if not self._make_room(len(kept)):
                return False
            self._parts[key] = kept
            self._used_bytes += len(kept)
            self._order.insert(key)
        return True

    def remove(self, key: PartKey) -> None:
        with self._lock:
            self._begin("remove", key)
            if key in self._parts:
                self._drop(key)

    def keys(self) -> Iterator[PartKey]:
        with self._lock:
            self._begin("keys")
            return iter(list(self._parts))

    def clear(self) -> int:
        with self._lock:
            self._begin("clear")
            found = list(self._parts)
            for key in found:
                self._drop(key)
        return len(found)

    def usage(self) -> StoreUsage:
        with self._lock:
            self._begin("usage")
            return StoreUsage(len(self._parts), self._used_bytes, self._capacity_bytes, self._num_evicted)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._changed.notify_all()

    def _begin(self, call: str, *keys: PartKey) -> None:
        self.calls[call] += 1
        if self._is_closed:
            raise StoreError(f"{self.name} is closed")
        if any(self.fault_of(key) is Fault.ERROR for key in keys):
            raise StoreError(f"{self.name} was told to fail")

    def _wait(self) -> None:
        """The lock is free meanwhile."""
        releases = self._num_releases
        self._num_waiting += 1
        self._changed.wait_for(lambda: self._is_closed or self._num_releases > releases, self._delay_s)
        self._num_waiting -= 1
        if self._is_closed:
            raise StoreError(f"{self.name} was closed meanwhile")

    def _spoil(self, key: PartKey, fault: Fault | None) -> bytes:
        part = self._parts[key]
        match fault:
            case Fault.TRUNCATED:
                return part[: len(part) // 2]
            case Fault.FLIPPED:
                byte, bit = divmod(_draw(self._seed + 1, key) % (8 * len(part)), 8)
                return part[:byte] + bytes([part[byte] ^ 1 << bit]) + part[byte + 1 :]
            case Fault.SWAPPED:
                return next((other for at, other in self._parts.items() if at != key), part)
        return part

    def _make_room(self, size_bytes: int) -> bool:
        if not self._capacity_bytes:
            return True
        if size_bytes > self._capacity_bytes:
            return False
        while self._used_bytes + size_bytes > self._capacity_bytes:
            victim = self._order.victim(lambda _: True)
            assert victim is not None
            self._drop(victim)
            self._num_evicted += 1
        return True

    def _drop(self, key: PartKey) -> None:
        self._used_bytes -= len(self._parts.pop(key))
        self._order.remove(key)


def _draw(seed: int, key: PartKey) -> int:
    """64 bits."""
    return int.from_bytes(blake3(f"{seed}/{key.text}".encode()).digest(8), "little")
