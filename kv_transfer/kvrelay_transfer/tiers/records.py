"""What is kept as one: all parts of it, or nothing. And how bytes get in and out of the pool that they belong to.

Knows no tiers: `chain.py` moves parts between these and the stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvrelay_transfer.tiers.part_key import PartKey

PART_BYTES = 4 << 20  # raw, at most: the size at which Redis is fastest


@dataclass(frozen=True, slots=True)
class Record:
    """`part_bytes` are the raw sizes of its parts."""

    keys: tuple[PartKey, ...]
    part_bytes: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return sum(self.part_bytes)


class RecordSource(Protocol):
    """A record in a pool whose blocks may be given away at any time. Called on threads of the tiers."""

    def copy_out(self, part: int, into: memoryview) -> None:
        """Copies the part's raw bytes; they are in `into` when it returns."""

    def is_intact(self) -> bool:
        """Whether nothing of the record was overwritten until now (PROTOCOL A7)."""


class RecordDestination(Protocol):
    """Where a record goes: memory that belongs to the fetch until that is terminal (PROTOCOL A5)."""

    def copy_in(self, part: int, raw: memoryview) -> None:
        """Copies the part's raw bytes; they are in the pool when it returns. Called on threads of the tiers."""
