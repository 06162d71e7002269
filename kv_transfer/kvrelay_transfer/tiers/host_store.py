"""Parts in host memory: raw bodies, each with room for a header in front, so that they move to and from files and
sockets without another copy.

A slot is *free*, *reserved* (by one thread, which fills it), or holds a *published* part. Who reads a part borrows it:
it does not go away under him. A part that is removed while it is borrowed goes when the last one gives it back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from kvrelay_transfer.tiers.eviction import Eviction, Lru
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.part_format import HEADER_BYTES, BadPart, PartHeader, read_header, seal_part
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import PartStore, StoreError, StoreUsage

_MAX_ASKED = 64  # parts, for one that may be evicted


class Slot:
    """Reserved memory: it belongs to whoever reserved it until it is published or withdrawn."""

    def __init__(self, index: int, room: memoryview) -> None:
        self.index = index
        self.room = room  # header and body

    def body(self, size_bytes: int) -> memoryview:
        return self.room[HEADER_BYTES : HEADER_BYTES + size_bytes]


class HostPart:
    """A published part. Its body is not written any more."""

    def __init__(self, slot: Slot, key: PartKey, num_parts: int, raw_bytes: int, *, is_sealed: bool) -> None:
        self.slot = slot
        self.key = key
        self.num_parts = num_parts
        self.raw = slot.body(raw_bytes)
        self.num_borrows = 0  # under the store's lock, as the next one
        self.is_published = True
        self._is_sealed = is_sealed
        self._sealing = threading.Lock()

    def sealed(self, secret: bytes) -> memoryview:
        """Header and body. Takes as long as hashing the body, the first time."""
        part = self.slot.room[: HEADER_BYTES + len(self.raw)]
        with self._sealing:
            if not self._is_sealed:
                seal_part(PartHeader(self.key, self.num_parts, len(self.raw), len(self.raw)), part, secret)
                self._is_sealed = True
        return part


class Borrow:
    """A part that stays while this is held. To be given back once; again does nothing."""

    def __init__(self, store: HostStore, part: HostPart) -> None:
        self._store: HostStore | None = store
        self.part = part

    def give_back(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store._give_back(self.part)

    def __enter__(self) -> HostPart:
        return self.part

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()


class HostStore(PartStore):
    """The lock is held for dictionary work only."""

    name = "host"

    def __init__(self, slab: HostSlab, eviction: Eviction[PartKey] | None = None, *, secret: bytes = b"") -> None:
        # A GPU's bus is filled by several copies under way, memory by one thread.
        self.num_readers = self.num_writers = 3 if slab.is_pinned else 1
        self._slab = slab
        self._order: Eviction[PartKey] = eviction or Lru()
        self._secret = secret
        self._lock = threading.Lock()
        self._free = list(range(slab.num_slots))
        self._parts: dict[PartKey, HostPart] = {}
        self._num_evicted = 0
        self._is_closed = False

    # ---------------------------------------------------------------------------------------------- slots

    @property
    def num_slots(self) -> int:
        return self._slab.num_slots

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_borrowed(self) -> int:
        """Of the parts that are here."""
        with self._lock:
            return sum(part.num_borrows > 0 for part in self._parts.values())

    @property
    def max_part_bytes(self) -> int:
        """The largest raw part that fits."""
        return self._slab.slot_bytes - HEADER_BYTES

    def reserve(self, raw_bytes: int, may_evict: Callable[[PartKey], bool] | None = None) -> Slot | None:
        """A slot to be filled, if need be that of the part whose turn it is. None: too large, or all are in use, or
        those whose turn is near may not be evicted. `may_evict` is asked under the lock."""
        with self._lock:
            if self._is_closed or raw_bytes > self.max_part_bytes:
                return None
            if not self._free:
                key = self._coldest(may_evict, _MAX_ASKED) if may_evict else self._order.victim(self._is_unborrowed)
                if key is None:
                    return None
                self._drop(key)
                self._num_evicted += 1
            index = self._free.pop()
        return Slot(index, self._slab.slot(index))

    def publish(self, slot: Slot, key: PartKey, num_parts: int, raw_bytes: int, *, is_sealed: bool = False) -> Borrow:
        """The slot's body is whole; everybody may read it now. If the part is here already, that one stays instead.
        `is_sealed`: its header is there, too. The part is lent to the caller."""
        part = HostPart(slot, key, num_parts, raw_bytes, is_sealed=is_sealed)
        with self._lock:
            present = self._parts.get(key)
            if present is not None or self._is_closed:
                if present is None:
                    part.is_published = False  # lent for the last time
                    part.num_borrows += 1
                    return Borrow(self, part)
                self._free.append(slot.index)
                self._order.touch(key)
                part = present
            else:
                self._parts[key] = part
                self._order.insert(key)
            part.num_borrows += 1
        return Borrow(self, part)

    def withdraw(self, slot: Slot) -> None:
        """Gives a reserved slot back; nobody writes to it any more."""
        with self._lock:
            self._free.append(slot.index)

    def borrow(self, key: PartKey) -> Borrow | None:
        """Counts as a use. None when it is not here."""
        with self._lock:
            part = self._parts.get(key)
            if part is None:
                return None
            part.num_borrows += 1
            self._order.touch(key)
        return Borrow(self, part)

    def lend(self, key: PartKey) -> Borrow | None:
        """The same, and no use: to write it to another tier."""
        with self._lock:
            part = self._parts.get(key)
            if part is None:
                return None
            part.num_borrows += 1
        return Borrow(self, part)

    def __contains__(self, key: PartKey) -> bool:
        return key in self._parts

    def num_leading(self, keys: Sequence[PartKey]) -> int:
        """How many of `keys`, from the first on, are here; also of a closed store."""
        with self._lock:
            return next((index for index, key in enumerate(keys) if key not in self._parts), len(keys))

    def oldest_first(self) -> list[PartKey]:
        """All that are here, in the order in which they came; of a closed store none."""
        with self._lock:
            return list(self._parts)

    def borrow_coldest(self, is_wanted: Callable[[PartKey], bool], max_asked: int) -> Borrow | None:
        """Of the parts that would be evicted next, the first that is wanted; `max_asked` are looked at. No use."""
        with self._lock:
            key = self._coldest(is_wanted, max_asked)
            if key is None:
                return None
            part = self._parts[key]
            part.num_borrows += 1
        return Borrow(self, part)

    def _coldest(self, is_wanted: Callable[[PartKey], bool], max_asked: int) -> PartKey | None:
        asked = 0

        def may_go(key: PartKey) -> bool:
            nonlocal asked
            asked += 1
            return asked > max_asked or (self._is_unborrowed(key) and is_wanted(key))

        key = self._order.victim(may_go)
        return None if asked > max_asked else key

    def _is_unborrowed(self, key: PartKey) -> bool:
        return self._parts[key].num_borrows == 0

    def _give_back(self, part: HostPart) -> None:
        with self._lock:
            part.num_borrows -= 1
            if part.num_borrows == 0 and not part.is_published:
                self._free.append(part.slot.index)

    def _drop(self, key: PartKey) -> None:
        part = self._parts.pop(key)
        self._order.remove(key)
        part.is_published = False
        if part.num_borrows == 0:
            self._free.append(part.slot.index)

    # ------------------------------------------------------------------------------------------ PartStore

    def count_prefix(self, keys: Sequence[PartKey]) -> int:
        self._check_open()
        return self.num_leading(keys)

    def get(self, key: PartKey, into: memoryview) -> int | None:
        self._check_open()
        borrow = self.borrow(key)
        if borrow is None:
            return None
        with borrow as part:
            sealed = part.sealed(self._secret)
            if len(sealed) > len(into):
                return None
            into[: len(sealed)] = sealed
            return len(sealed)

    def put(self, key: PartKey, part: memoryview) -> bool:
        """Of raw parts only: False for others."""
        self._check_open()
        header = read_header(part)
        if isinstance(header, BadPart) or header.codec or len(part) != HEADER_BYTES + header.raw_bytes:
            return False
        present = self.borrow(key)
        if present is not None:
            present.give_back()
            return True
        slot = self.reserve(header.raw_bytes)
        if slot is None:
            return False
        slot.room[: len(part)] = part
        self.publish(slot, key, header.num_parts, header.raw_bytes, is_sealed=True).give_back()
        return True

    def remove(self, key: PartKey) -> None:
        with self._lock:
            self._check_open()
            if key in self._parts:
                self._drop(key)

    def keys(self) -> Iterator[PartKey]:
        self._check_open()
        return iter(self.oldest_first())

    def clear(self) -> int:
        with self._lock:
            self._check_open()
            found = list(self._parts)
            for key in found:
                self._drop(key)
        return len(found)

    def usage(self) -> StoreUsage:
        self._check_open()
        return self.occupancy()

    def occupancy(self) -> StoreUsage:
        """The same, also of a closed store."""
        with self._lock:
            slot_bytes = self._slab.slot_bytes
            num_parts = len(self._parts)
            return StoreUsage(num_parts, num_parts * slot_bytes, self.num_slots * slot_bytes, self._num_evicted)

    def close(self) -> None:
        """Parts that are lent stay readable."""
        with self._lock:
            self._is_closed = True
            for key in list(self._parts):
                self._drop(key)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError("the host store is closed")
