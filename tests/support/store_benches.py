"""One test bench per store: how it is made, opened anew, and lied to. The contract suite sees only `StoreBench`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from kvrelay_transfer.tiers.fake_store import FakeStore
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import PartStore


class StoreBench(ABC):
    """`store` is new and empty, with room for all that a test puts there."""

    is_bounded = True  # keeps to `capacity_bytes`, least recently used first
    is_durable = False  # another store over the same place finds what the first one put
    can_lie = True  # others can reach what lies there

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store: PartStore = self.open()

    @abstractmethod
    def open(self, capacity_bytes: int = 1 << 30) -> PartStore:
        """One more store, over the same place if it is durable. Whoever opens it closes it."""

    def room_of(self, part_bytes: int) -> int:
        """What a part of so many bytes takes of the capacity."""
        return part_bytes

    def replace(self, key: PartKey, part: bytes) -> None:
        """What lies there under `key` becomes `part`, and nobody tells the store."""
        self.store.remove(key)
        self.store.put(key, memoryview(part))

    def close(self) -> None:
        self.store.close()


class FakeBench(StoreBench):
    def open(self, capacity_bytes: int = 1 << 30) -> FakeStore:
        return FakeStore(capacity_bytes=capacity_bytes)


BENCHES: dict[str, type[StoreBench]] = {"fake": FakeBench}
