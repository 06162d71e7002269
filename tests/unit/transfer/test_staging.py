"""The staging ring: blocks to slots and back, through the path that the service process opens."""

from __future__ import annotations

import os

import pytest
import torch
from handoff_sides import LAYOUT, fill_block, make_memory

from kvrelay_core.errors import TransferError, UnavailableError
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots

BLOCKS_PER_SLOT = 3
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_travel_through_both_sides(device: str) -> None:
    source, destination = make_memory(8, device=device), make_memory(8, device=device)
    for block in range(8):
        fill_block(source, block, seed=block)
    slots = StagingSlots.create(2, BLOCKS_PER_SLOT * LAYOUT.block_bytes)
    service = StagingSlots.open(slots.fd_path, 2, slots.slot_bytes)
    out, back = BlockStaging(source, slots), BlockStaging(destination, slots)

    out.copy_out((6, 2, 5), slot=0)
    with service.slot(0) as sent, service.slot(1) as received:
        received[:] = sent
    back.copy_in(1, (1, 7, 3))

    assert torch.equal(destination.block_rows[[1, 7, 3]], source.block_rows[[6, 2, 5]])
    assert not destination.block_rows[[0, 2, 4, 5, 6]].any()
    for closable in (out, back, slots, service, source, destination):
        closable.close()


def test_a_piece_may_be_shorter_than_its_slot() -> None:
    memory = make_memory(8)
    fill_block(memory, 4, seed=9)
    slots = StagingSlots.create(1, BLOCKS_PER_SLOT * LAYOUT.block_bytes)
    staging = BlockStaging(memory, slots)
    staging.copy_out((4,), slot=0)
    with slots.slot(0) as view:
        assert bytes(view[: LAYOUT.block_bytes]) == bytes(memory.block_rows[4].tolist())
        assert not any(view[LAYOUT.block_bytes :])
    staging.close()
    slots.close()
    memory.close()


@pytest.mark.parametrize(("blocks", "slot"), [((1, 2, 3, 4), 0), ((1,), 1), ((1,), -1), ((0,), 0), ((8,), 0)])
def test_what_does_not_fit_is_refused(blocks: tuple[int, ...], slot: int) -> None:
    memory = make_memory(8)
    slots = StagingSlots.create(1, BLOCKS_PER_SLOT * LAYOUT.block_bytes)
    staging = BlockStaging(memory, slots)
    with pytest.raises(TransferError):
        staging.copy_out(blocks, slot)
    with pytest.raises(TransferError):
        staging.copy_in(slot, blocks)
    staging.close()
    slots.close()
    memory.close()


def test_a_slot_outside_the_ring_is_an_error() -> None:
    slots = StagingSlots.create(2, 4096)
    with pytest.raises(IndexError):
        slots.slot(2)
    slots.close()


def test_a_gone_engine_is_unavailable() -> None:
    with pytest.raises(UnavailableError):
        StagingSlots.open(f"/proc/{os.getpid()}/fd/9999", 1, 4096)


def test_slots_hold_whole_blocks() -> None:
    assert slot_bytes_for(3000) % 3000 == 0
    assert slot_bytes_for(64 << 20) == 64 << 20
