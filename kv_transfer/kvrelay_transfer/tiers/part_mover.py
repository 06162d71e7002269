"""Moves one part between a tier and host memory: verified and decoded on its way up, encoded and sealed down.

Runs on threads of the tiers. Where host memory has no room, a part comes up into memory of the thread's own. Knows no
records, no requests and no pools.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable

from kvrelay_transfer.tiers.codec import Codec
from kvrelay_transfer.tiers.host_store import Borrow, HostPart, HostStore
from kvrelay_transfer.tiers.part_format import HEADER_BYTES, PartHeader, open_part, seal_part
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.tier import Tier
from kvrelay_transfer.tiers.tier_stats import Count


class LoadedPart:
    """`raw` is good until it is given back, on the thread that loaded it."""

    def __init__(self, raw: memoryview, borrow: Borrow | None) -> None:
        self.raw = raw
        self._borrow = borrow

    def give_back(self) -> None:
        if self._borrow is not None:
            self._borrow.give_back()


class PartMover:
    """Thread-safe."""

    def __init__(self, host: HostStore, *, codec: Codec | None = None, secret: bytes = b"") -> None:
        self._host = host
        self._codec = codec
        self._secret = secret
        self._scratch = _Scratch(HEADER_BYTES + host.max_part_bytes)

    def load(
        self, tier: Tier, key: PartKey, num_parts: int, raw_bytes: int, may_evict: Callable[[PartKey], bool]
    ) -> LoadedPart | None:
        """None when the tier does not give it, whole and unharmed. `may_evict` says which parts of host memory may
        make way for one that can be loaded again at any time."""
        slot = self._host.reserve(raw_bytes, may_evict)
        room = self._scratch.raw if slot is None else slot.room
        is_loaded = False
        try:
            is_loaded = self._load_into(room, tier, PartHeader(key, num_parts, raw_bytes, raw_bytes))
        finally:
            if slot is not None and not is_loaded:
                self._host.withdraw(slot)
        if not is_loaded:
            return None
        tier.known.add(key)
        tier.counts.add(Count.HITS)
        tier.counts.add(Count.READ_BYTES, raw_bytes)
        if slot is None:
            return LoadedPart(room[HEADER_BYTES : HEADER_BYTES + raw_bytes], None)
        borrow = self._host.publish(slot, key, num_parts, raw_bytes, is_sealed=self._codec is None)
        return LoadedPart(borrow.part.raw, borrow)

    def write(self, tier: Tier, part: HostPart) -> bool:
        """Whether the tier has it now."""
        return tier.write(part.key, lambda: self._sealed(part))

    def _load_into(self, room: memoryview, tier: Tier, wanted: PartHeader) -> bool:
        """The body, raw, behind room for a header, which comes along if no codec is used. All the room that there is
        is offered, so that a part that is too long is found to be bad."""
        sealed = room if self._codec is None else self._scratch.sealed
        length = tier.get(wanted.key, sealed, wanted.raw_bytes)
        if length is None:
            return False
        found = open_part(wanted.key, sealed[:length], self._secret)
        raw = room[HEADER_BYTES : HEADER_BYTES + wanted.raw_bytes]
        if isinstance(found, PartHeader) and self._take(found, sealed[HEADER_BYTES:length], raw):
            return True
        tier.reject(wanted.key)
        return False

    def _take(self, header: PartHeader, body: memoryview, raw: memoryview) -> bool:
        """The body into its place; False for one of another size or codec."""
        if header.raw_bytes != len(raw):
            return False
        if self._codec is None:
            return header.codec == 0 and len(body) == len(raw)  # it is where it should be
        if header.codec == self._codec.number:
            return self._codec.decode(body, raw)
        if header.codec != 0 or len(body) != len(raw):
            return False
        raw[:] = body
        return True

    def _sealed(self, part: HostPart) -> memoryview:
        """Good until the thread seals the next one, as long as the part is borrowed."""
        if self._codec is not None:
            scratch = self._scratch.sealed
            length = self._codec.encode(part.raw, scratch[HEADER_BYTES : HEADER_BYTES + len(part.raw)])
            if length is not None:
                sealed = scratch[: HEADER_BYTES + length]
                header = PartHeader(part.key, part.num_parts, len(part.raw), length, self._codec.number)
                seal_part(header, sealed, self._secret)
                return sealed
        return part.sealed(self._secret)


class _Scratch(threading.local):
    """Of each thread its own; takes no memory until it is written to."""

    def __init__(self, size_bytes: int) -> None:
        self.sealed = memoryview(mmap.mmap(-1, size_bytes))
        self.raw = memoryview(mmap.mmap(-1, size_bytes))
