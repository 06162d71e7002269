"""A chain over fake stores, with records, sources and destinations that a test looks into. Nothing here sleeps."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from handoff_sides import wait_until

from kvrelay_core.clock import ManualClock
from kvrelay_transfer.tiers.chain import TierChain
from kvrelay_transfer.tiers.codec import Codec
from kvrelay_transfer.tiers.eviction import Eviction
from kvrelay_transfer.tiers.fake_store import FakeStore
from kvrelay_transfer.tiers.fetch import Fetch, FetchLimits
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.part_format import HEADER_BYTES, PartHeader, seal_part
from kvrelay_transfer.tiers.part_key import KeyMaker, PartKey
from kvrelay_transfer.tiers.part_store import PartStore
from kvrelay_transfer.tiers.records import Record, RecordDestination
from kvrelay_transfer.tiers.tier import Tier, TierLimits, WritePolicy

PART_BYTES = 4000  # at most
SLOT_BYTES = 8192
NEVER_S = 1e9


def record_of(number: int, num_parts: int = 2) -> Record:
    maker = KeyMaker((b"kv", b"model"))
    keys = tuple(maker.key(number.to_bytes(8, "little"), part) for part in range(num_parts))
    return Record(keys, (PART_BYTES,) * (num_parts - 1) + (PART_BYTES - 100,))


def records_of(*numbers: int, num_parts: int = 2) -> list[Record]:
    return [record_of(number, num_parts) for number in numbers]


def raw_of(record: Record, part: int) -> bytes:
    return random.Random(record.keys[part].text).randbytes(record.part_bytes[part])


def sealed_of(record: Record, part: int, secret: bytes = b"") -> bytes:
    raw = raw_of(record, part)
    sealed = bytearray(HEADER_BYTES) + raw
    seal_part(PartHeader(record.keys[part], len(record.keys), len(raw), len(raw)), memoryview(sealed), secret)
    return bytes(sealed)


def put(store: PartStore, *records: Record, secret: bytes = b"") -> None:
    for record in records:
        for part, key in enumerate(record.keys):
            assert store.put(key, memoryview(sealed_of(record, part, secret)))


class Gate:
    """Holds the threads that come to it while it is shut."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._is_open.set()
        self._lock = threading.Lock()
        self._num_passes = -1
        self.num_waiting = 0

    def shut(self, after: int = 0) -> None:
        """`after` so many more have passed."""
        self._num_passes = after
        if after == 0:
            self._is_open.clear()

    def open(self) -> None:
        self._num_passes = -1
        self._is_open.set()

    def pass_through(self) -> None:
        with self._lock:
            self.num_waiting += 1
            must_wait = not self._is_open.is_set()
            self._num_passes -= 1
            if self._num_passes == 0:
                self._is_open.clear()
        if must_wait:
            assert self._is_open.wait(timeout=20)
        with self._lock:
            self.num_waiting -= 1


class GatedStore(FakeStore):
    """Lookups wait at a gate."""

    def __init__(self, name: str = "fake") -> None:
        super().__init__(name=name)
        self.lookups = Gate()

    def count_prefix(self, keys: Sequence[PartKey]) -> int:
        self.lookups.pass_through()
        return super().count_prefix(keys)


class FakeSource:
    """A record in a pool: what `raw_of` says, until it is overwritten."""

    def __init__(self, record: Record) -> None:
        self.gate = Gate()
        self.num_copies = 0
        self._is_intact = True
        self._parts = [bytearray(raw_of(record, part)) for part in range(len(record.keys))]

    def overwrite(self) -> None:
        """The word first, then the bytes."""
        self._is_intact = False
        for part in self._parts:
            part[:] = b"\xee" * len(part)

    def copy_out(self, part: int, into: memoryview) -> None:
        half = len(into) // 2
        into[:half] = self._parts[part][:half]
        self.gate.pass_through()
        into[half:] = self._parts[part][half:]
        self.num_copies += 1

    def is_intact(self) -> bool:
        return self._is_intact


class FakeDestination:
    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.parts: dict[int, bytes] = {}

    def copy_in(self, part: int, raw: memoryview) -> None:
        self._gate.pass_through()
        assert part not in self.parts, "loaded twice"
        self.parts[part] = bytes(raw)


class FetchRig:
    """A fetch with room for as many records as `num_rooms`."""

    def __init__(
        self,
        chain: TierChain,
        records: Sequence[Record],
        until_s: float = NEVER_S,
        is_worth: Callable[[int, float], bool] = lambda num_records, seconds: True,
        num_rooms: int = 1000,
    ) -> None:
        self.records = records
        self.gate = Gate()
        self.num_rooms = num_rooms
        self.destinations: list[FakeDestination] = []
        self.fetch: Fetch = chain.fetch(records, self._take_room, until_s, is_worth)

    def _take_room(self, first: int, end: int) -> list[RecordDestination] | None:
        assert first == len(self.destinations) < end <= len(self.records)
        if end > self.num_rooms:
            return None
        rooms = [FakeDestination(self.gate) for _ in range(first, end)]
        self.destinations += rooms
        return list(rooms)

    def poll_until(self, condition: Callable[[], bool]) -> None:
        def is_there() -> bool:
            self.fetch.poll()
            return condition()

        wait_until(is_there)

    def poll_to_the_end(self) -> None:
        self.poll_until(lambda: self.fetch.is_terminal)
        assert self.fetch.is_over

    def finish(self) -> int:
        """Polls until it is terminal; checks every byte of what is loaded, and returns how many records are."""
        self.poll_to_the_end()
        for record, destination in zip(self.records[: self.fetch.num_loaded], self.destinations, strict=False):
            parts = [destination.parts[part] for part in range(len(record.keys))]
            assert parts == [raw_of(record, part) for part in range(len(record.keys))]
        return self.fetch.num_loaded


class ChainRig:
    """Closes its chain in the end; no thread of it is left then, and no slot is lost."""

    def __init__(
        self,
        *stores: PartStore,
        num_slots: int = 64,
        policies: Sequence[WritePolicy] = (),
        codec: Codec | None = None,
        secret: bytes = b"",
        eviction: Eviction[PartKey] | None = None,
        tier_limits: TierLimits | None = None,
        limits: FetchLimits | None = None,
        max_offers: int = 256,
    ) -> None:
        self._others = threading.enumerate()
        self.clock = ManualClock()
        self.stores = stores
        self.host = HostStore(HostSlab(num_slots * SLOT_BYTES, PART_BYTES), eviction, secret=secret)
        policies = policies or [WritePolicy.COMPLETION] * len(stores)
        self.tiers = [
            Tier(store, self.clock, policy=policy, limits=tier_limits)
            for store, policy in zip(stores, policies, strict=True)
        ]
        self.chain = TierChain(
            self.host, self.tiers, codec=codec, secret=secret, clock=self.clock, limits=limits, max_offers=max_offers
        )

    def fetch(
        self,
        records: Sequence[Record],
        until_s: float = NEVER_S,
        is_worth: Callable[[int, float], bool] = lambda num_records, seconds: True,
        num_rooms: int = 1000,
    ) -> FetchRig:
        return FetchRig(self.chain, records, until_s, is_worth, num_rooms)

    def offer(self, *records: Record) -> list[FakeSource]:
        sources = [FakeSource(record) for record in records]
        for record, source in zip(records, sources, strict=True):
            assert self.chain.offer(record, source)
        return sources

    def counts(self, name: str) -> dict[str, int]:
        return next(tier.counts for tier in self.chain.stats().tiers if tier.name == name)

    def __enter__(self) -> ChainRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.chain.close()
        alive = [thread.name for thread in threading.enumerate() if thread not in self._others]
        assert not alive, alive
        if error is None:
            assert self.host.num_free == self.host.num_slots, "a slot is lost"
