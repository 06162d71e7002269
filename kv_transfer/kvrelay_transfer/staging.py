"""The engine's side of the staging ring: blocks between the pool and a slot, on any device.

A slot holds whole blocks, of our layout or, where they come from a peer of another one, of the peer's. On CPU by
memmove of merged runs: torch's index_copy_ of bytes reaches a twentieth of its speed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.base import BlockSlices, check_block_range
from kvrelay_transfer.connectors.copy_thread import merge_runs
from kvrelay_transfer.embedding_layout import PoolLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.slice_copy import BlockBytes, copy_slices
from kvrelay_transfer.staging_slots import StagingSlots

# Slots of about this size keep both the copies and the messages about them few.
TARGET_SLOT_BYTES = 4 << 20
# A slot holds a block of a peer with up to so many tokens a block.
MAX_PEER_BLOCK_TOKENS = 128


def slot_bytes_for(layout: PoolLayout) -> int:
    """Whole blocks: of ours at least one, and as many as are in the largest block of a peer."""
    peer_blocks = MAX_PEER_BLOCK_TOKENS // layout.block_tokens
    return max(1, peer_blocks, TARGET_SLOT_BYTES // layout.block_bytes) * layout.block_bytes


class BlockStaging:
    def __init__(self, memory: PoolMemory, slots: StagingSlots) -> None:
        """Raises ConfigError when memory is short."""
        assert slots.slot_bytes >= memory.layout.block_bytes, "a slot holds at least one block"
        self._memory = memory
        self._block_bytes = memory.layout.block_bytes
        self.layout = memory.layout
        self.slot_bytes = slots.slot_bytes
        self._slots = [torch.frombuffer(slots.slot(index), dtype=torch.uint8) for index in range(slots.num_slots)]

    def copy_out(self, blocks: tuple[int, ...], slot: int) -> None:
        """Pool to slot. The bytes are in the slot when it returns."""
        self._check(blocks, slot)
        rows = self._rows(slot, len(blocks))
        if self._memory.device == "cpu":
            for block, position, count in merge_runs(blocks, range(len(blocks))):
                ctypes.memmove(self._address(rows, position), self._pool_address(block), count * self._block_bytes)
        else:
            index = torch.tensor(blocks, device=self._memory.tensor.device)
            rows.copy_(self._memory.block_rows.index_select(0, index))

    def copy_in(self, slot: int, blocks: tuple[int, ...]) -> None:
        """Slot to pool. The slot can be reused when it returns."""
        self._check(blocks, slot)
        rows = self._rows(slot, len(blocks))
        if self._memory.device == "cpu":
            for position, block, count in merge_runs(range(len(blocks)), blocks):
                ctypes.memmove(self._pool_address(block), self._address(rows, position), count * self._block_bytes)
        else:
            device = self._memory.tensor.device
            self._memory.block_rows.index_copy_(0, torch.tensor(blocks, device=device), rows.to(device))

    def copy_in_slices(
        self, slot: int, sent_block_bytes: int, positions: Sequence[int], blocks: Sequence[int], slices: BlockSlices
    ) -> None:
        """Slot to pool: slices of blocks that a peer sent, of `sent_block_bytes` each. `positions` number them and may
        repeat. The caller has checked that the slices lie within their blocks."""
        self._check_slot(slot, (max(positions) + 1) * sent_block_bytes)
        check_block_range(blocks, self._memory.num_blocks, "our")
        sent = self._slots[slot]
        if self._memory.device == "cpu":
            source = BlockBytes(sent.numpy(), sent_block_bytes)
            copy_slices(source, positions, self._memory.host_blocks, blocks, slices)
            return
        pool = self._memory.block_rows
        sent_rows = sent[: (max(positions) + 1) * sent_block_bytes].to(pool.device).view(-1, sent_block_bytes)
        shape = slices.shape
        size = (shape.outer, shape.inner, shape.row_bytes)
        remote_strides = (shape.remote_outer_stride, shape.remote_inner_stride, 1)
        local_strides = (shape.local_outer_stride, shape.local_inner_stride, 1)
        offsets = zip(slices.remote_offsets, slices.local_offsets, strict=True)
        for position, block, (remote, local) in zip(positions, blocks, offsets, strict=True):
            rows = sent_rows[position][remote:].as_strided(size, remote_strides)
            pool[block][local:].as_strided(size, local_strides).copy_(rows)

    def close(self) -> None:
        """Lets go of the slots, so that they can be closed."""
        self._slots.clear()

    def _check(self, blocks: tuple[int, ...], slot: int) -> None:
        self._check_slot(slot, len(blocks) * self._block_bytes)
        check_block_range(blocks, self._memory.num_blocks, "our")

    def _check_slot(self, slot: int, size_bytes: int) -> None:
        if not 0 <= slot < len(self._slots) or size_bytes > self.slot_bytes:
            raise TransferError(
                f"{size_bytes} bytes for slot {slot}: there are {len(self._slots)} slots of {self.slot_bytes} bytes"
            )

    def _rows(self, slot: int, num_blocks: int) -> torch.Tensor:
        """The first blocks of a slot [num_blocks, block_bytes], of our layout."""
        return self._slots[slot][: num_blocks * self._block_bytes].view(num_blocks, self._block_bytes)

    def _pool_address(self, block: int) -> int:
        return self._memory.data_address + block * self._block_bytes

    def _address(self, rows: torch.Tensor, position: int) -> int:
        return rows.data_ptr() + position * self._block_bytes
