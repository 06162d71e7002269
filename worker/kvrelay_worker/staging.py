"""Who uses which slot of the engine's staging ring, and the bytes in them.

One half of the slots sends, the other receives, so that neither direction can starve the other. The engine only
copies into and out of the slots it is told. Knows nothing of what the bytes are.
"""

from __future__ import annotations

import asyncio

from kvrelay_core.errors import InternalError
from kvrelay_engine.messages import Started
from kvrelay_transfer.staging_slots import StagingSlots


class SlotAllocator:
    """Slots of one direction. A slot is given back by whoever knows that nobody touches it any more."""

    def __init__(self, slots: range) -> None:
        self._free: asyncio.Queue[int] = asyncio.Queue()
        self._taken: set[int] = set()
        for slot in slots:
            self._free.put_nowait(slot)

    @property
    def num_taken(self) -> int:
        return len(self._taken)

    async def acquire(self) -> int:
        slot = await self._free.get()
        self._taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        if slot not in self._taken:
            raise InternalError(f"staging slot {slot} was given back twice")
        self._taken.remove(slot)
        self._free.put_nowait(slot)


class Staging:
    def __init__(self, slots: StagingSlots, block_bytes: int) -> None:
        """`block_bytes` of the largest block that is sent."""
        if slots.slot_bytes < block_bytes or slots.num_slots < 2:
            raise InternalError(f"{slots.num_slots} staging slots of {slots.slot_bytes} bytes are too few or too small")
        self._slots = slots
        self.slot_bytes = slots.slot_bytes
        self.exports = SlotAllocator(range(slots.num_slots // 2))
        self.imports = SlotAllocator(range(slots.num_slots // 2, slots.num_slots))

    @classmethod
    def open(cls, started: Started) -> Staging:
        """Raises UnavailableError when the engine is gone."""
        slots = StagingSlots.open(started.staging_fd_path, started.staging_slots, started.staging_slot_bytes)
        return cls(slots, max(layout.block_bytes for layout in started.groups))

    def read(self, slot: int, offset: int, size_bytes: int) -> bytes:
        with self._slots.slot(slot) as view:
            return bytes(view[offset : offset + size_bytes])

    def write(self, slot: int, offset: int, data: bytes) -> None:
        with self._slots.slot(slot) as view:
            view[offset : offset + len(data)] = data

    def close(self) -> None:
        self._slots.close()
