"""One test bench per store: how it is made, opened anew, and lied to. The contract suite sees only `StoreBench`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from redis_servers import RedisServer

from kvrelay_transfer.tiers.disk_store import DiskStore
from kvrelay_transfer.tiers.fake_store import FakeStore
from kvrelay_transfer.tiers.host_slab import HostSlab
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import PartStore
from kvrelay_transfer.tiers.redis_store import RedisStore
from kvrelay_transfer.tiers.redis_targets import parse_redis_url


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


class HostBench(StoreBench):
    can_lie = False

    def open(self, capacity_bytes: int = 64 << 20) -> HostStore:
        return HostStore(HostSlab(capacity_bytes, 1_000_003))

    def room_of(self, part_bytes: int) -> int:
        return HostSlab(1, 1_000_003).slot_bytes


class DiskBench(StoreBench):
    is_durable = True

    def open(self, capacity_bytes: int = 1 << 30) -> DiskStore:
        """A small bound is that of a folder of its own."""
        folder = self.directory / f"disk-{capacity_bytes}"
        return DiskStore(folder, capacity_bytes)

    def room_of(self, part_bytes: int) -> int:
        return -(-part_bytes // 4096) * 4096

    def replace(self, key: PartKey, part: bytes) -> None:
        (found,) = self.directory.rglob(key.text)
        found.write_bytes(part)


class RedisBench(StoreBench):
    is_bounded = False  # Redis bounds itself
    is_durable = True

    def __init__(self, directory: Path) -> None:
        self._server = RedisServer(directory / "redis")
        self._server.start()
        super().__init__(directory)

    def open(self, capacity_bytes: int = 0) -> RedisStore:
        return RedisStore(parse_redis_url(self._server.url), timeout_s=10.0)

    def close(self) -> None:
        super().close()
        self._server.kill()


BENCHES: dict[str, type[StoreBench]] = {
    "disk": DiskBench,
    "fake": FakeBench,
    "host": HostBench,
    "redis": RedisBench,
}
