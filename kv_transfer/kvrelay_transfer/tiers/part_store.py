"""What a place that keeps parts can do. Every call blocks, and is made on a thread of the tier (`tier.py`).

A store moves sealed parts (`part_format`) and does not look into them. It never raises for what is its own trouble:
that is StoreError, which its tier counts and turns into a miss; everything else is a bug. A store may be asked by
several threads at once. It knows no models, no requests and no deadlines but its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from msgspec import Struct

from kvrelay_transfer.tiers.part_key import PartKey


class StoreError(Exception):
    """The place is down, slow, full or refuses. Never leaves the tier."""


class StoreUsage(Struct, frozen=True):
    num_parts: int
    used_bytes: int
    capacity_bytes: int  # 0: not ours to bound
    num_evicted: int = 0  # by us


class PartStore(ABC):
    """`name` is what metrics call it; `num_readers` and `num_writers` how many threads suit it."""

    name: str
    num_readers: int = 2
    num_writers: int = 1

    @abstractmethod
    def count_prefix(self, keys: Sequence[PartKey]) -> int:
        """How many of `keys`, from the first on, are here. A promise that `get` need not keep. Raises StoreError."""

    @abstractmethod
    def get(self, key: PartKey, into: memoryview) -> int | None:
        """Writes the part to the start of `into`; returns its length, None when it is not here or would not fit.
        What `into` holds is of no use unless a length came back. Counts as a use of the part. Raises StoreError."""

    @abstractmethod
    def put(self, key: PartKey, part: memoryview) -> bool:
        """False when there is no room for it. A part that is here already may be kept instead. After a crash it is
        here whole or not at all. Raises StoreError."""

    @abstractmethod
    def remove(self, key: PartKey) -> None:
        """Of a part that turned out to be bad. Raises StoreError."""

    @abstractmethod
    def keys(self) -> Iterator[PartKey]:
        """All that are here, in no order; those that come and go meanwhile may be missed. Raises StoreError."""

    @abstractmethod
    def clear(self) -> int:
        """Removes every part, of whatever model; returns how many. Raises StoreError."""

    @abstractmethod
    def usage(self) -> StoreUsage:
        """Raises StoreError."""

    @abstractmethod
    def close(self) -> None:
        """Calls that are under way end soon, with StoreError or as they would have."""
