"""The engine's side of the staging ring: whole blocks between the pool and a slot, on any device.

On CPU by memmove of merged runs: torch's index_copy_ of bytes reaches a twentieth of its speed.
"""

from __future__ import annotations

import ctypes

import torch

from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.base import check_block_range
from kvrelay_transfer.connectors.copy_thread import merge_runs
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging_slots import StagingSlots

# Slots of about this size keep both the copies and the messages about them few.
TARGET_SLOT_BYTES = 4 << 20


def slot_bytes_for(block_bytes: int) -> int:
    """Whole blocks, at least one."""
    return max(1, TARGET_SLOT_BYTES // block_bytes) * block_bytes


class BlockStaging:
    def __init__(self, memory: PoolMemory, slots: StagingSlots) -> None:
        """Raises ConfigError when memory is short."""
        assert slots.slot_bytes >= memory.layout.block_bytes, "a slot holds at least one block"
        self._memory = memory
        self._block_bytes = memory.layout.block_bytes
        self._blocks_per_slot = slots.slot_bytes // self._block_bytes
        self._rows = [self._slot_rows(slots, index) for index in range(slots.num_slots)]

    def copy_out(self, blocks: tuple[int, ...], slot: int) -> None:
        """Pool to slot. The bytes are in the slot when it returns."""
        self._check(blocks, slot)
        rows = self._rows[slot][: len(blocks)]
        if self._memory.device == "cpu":
            for block, position, count in merge_runs(blocks, range(len(blocks))):
                ctypes.memmove(self._address(rows, position), self._pool_address(block), count * self._block_bytes)
        else:
            index = torch.tensor(blocks, device=self._memory.tensor.device)
            rows.copy_(self._memory.block_rows.index_select(0, index))

    def copy_in(self, slot: int, blocks: tuple[int, ...]) -> None:
        """Slot to pool. The slot can be reused when it returns."""
        self._check(blocks, slot)
        rows = self._rows[slot][: len(blocks)]
        if self._memory.device == "cpu":
            for position, block, count in merge_runs(range(len(blocks)), blocks):
                ctypes.memmove(self._pool_address(block), self._address(rows, position), count * self._block_bytes)
        else:
            device = self._memory.tensor.device
            self._memory.block_rows.index_copy_(0, torch.tensor(blocks, device=device), rows.to(device))

    def close(self) -> None:
        """Lets go of the slots, so that they can be closed."""
        self._rows.clear()

    def _check(self, blocks: tuple[int, ...], slot: int) -> None:
        if not 0 <= slot < len(self._rows) or len(blocks) > self._blocks_per_slot:
            raise TransferError(
                f"{len(blocks)} blocks for slot {slot}: there are {len(self._rows)} slots of "
                f"{self._blocks_per_slot} blocks"
            )
        check_block_range(blocks, self._memory.num_blocks, "our")

    def _pool_address(self, block: int) -> int:
        return self._memory.data_address + block * self._block_bytes

    def _address(self, rows: torch.Tensor, position: int) -> int:
        return rows.data_ptr() + position * self._block_bytes

    def _slot_rows(self, slots: StagingSlots, index: int) -> torch.Tensor:
        size_bytes = self._blocks_per_slot * self._block_bytes
        flat = torch.frombuffer(slots.slot(index), dtype=torch.uint8, count=size_bytes)
        return flat.view(self._blocks_per_slot, self._block_bytes)
