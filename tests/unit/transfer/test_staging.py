"""The staging ring: blocks to slots and back, through the path that the service process opens."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from handoff_sides import LAYOUT, fill_block, make_memory
from msgspec.structs import replace
from split_kv import cut, glue, make_kv, rank_layout

from kvrelay_core.errors import TransferError, UnavailableError
from kvrelay_transfer.slice_plan import plan_ranks
from kvrelay_transfer.staging import TARGET_SLOT_BYTES, BlockStaging, slot_bytes_for
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


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_larger_blocks_are_cut_out_of_a_slot(device: str) -> None:
    theirs, ours = rank_layout(LAYOUT, 2, 16, 1, 0), LAYOUT
    kv = make_kv(LAYOUT, num_heads=2, num_tokens=30)
    memory = make_memory(16, device=device)
    slots = StagingSlots.create(1, slot_bytes_for(LAYOUT))
    staging = BlockStaging(memory, slots)
    sent = cut(kv, theirs)
    with slots.slot(0) as view:
        view[: sent.size] = sent.tobytes()
    (plan,) = plan_ranks(theirs, ours)
    pairs = plan.pair(0, 2, 30)
    assert pairs.slices is not None
    blocks = [2 * position + 1 for position in pairs.local]
    staging.copy_in_slices(0, theirs.block_bytes, pairs.remote.tolist(), blocks, pairs.slices)
    assert np.array_equal(glue(memory.block_rows[blocks].cpu().numpy(), ours, 30), kv)
    assert not memory.block_rows[::2].any()
    with pytest.raises(TransferError, match="slot"):
        staging.copy_in_slices(0, slots.slot_bytes, (1,), (1,), pairs.slices)
    for closable in (staging, slots, memory):
        closable.close()


@pytest.mark.parametrize("block_tokens", [4, 16, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [3, 128])
def test_slots_hold_whole_blocks_and_the_largest_of_a_peer(block_tokens: int, head_dim: int) -> None:
    layout = replace(LAYOUT, num_layers=32, num_kv_heads=8, block_tokens=block_tokens, head_dim=head_dim)
    slot_bytes = slot_bytes_for(layout)
    assert slot_bytes % layout.block_bytes == 0
    assert slot_bytes >= replace(layout, block_tokens=128).block_bytes
    assert slot_bytes <= max(TARGET_SLOT_BYTES, replace(layout, block_tokens=max(128, block_tokens)).block_bytes)
