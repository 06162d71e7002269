"""Strided copies of slices in host memory, against copying row by row."""

from __future__ import annotations

import random

import numpy as np
import pytest
from handoff_sides import LAYOUT
from split_kv import Bytes, copy_rows, rank_layout

from kvrelay_transfer import slice_copy
from kvrelay_transfer.connectors.base import BlockSlices, as_blocks
from kvrelay_transfer.slice_copy import BlockBytes, Run, copy_slices, merge_steps
from kvrelay_transfer.slice_plan import plan_ranks

NUM_BLOCKS = 24


def random_pool(block_bytes: int) -> Bytes:
    return np.random.default_rng(1).integers(0, 256, (NUM_BLOCKS, block_bytes), dtype=np.uint8)


class Case:
    """Source blocks of 8 tokens, ours of 2; blocks in order or scattered."""

    def __init__(self, *, is_scattered: bool) -> None:
        theirs, ours = rank_layout(LAYOUT, 2, 8, 1, 0), rank_layout(LAYOUT, 2, 2, 1, 0)
        (plan,) = plan_ranks(theirs, ours)
        pairs = plan.pair(0, 5, 39)
        assert pairs.slices is not None
        self.slices: BlockSlices = pairs.slices
        shuffled = random.Random(3).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        blocks = shuffled if is_scattered else list(range(NUM_BLOCKS))
        self.remote, self.local = as_blocks(blocks)[pairs.remote], as_blocks(blocks)[pairs.local]
        self.source = random_pool(theirs.block_bytes)
        self.target = np.zeros((NUM_BLOCKS, ours.block_bytes), np.uint8)
        self.expected = self.target.copy()
        copy_rows(self.source, self.remote, self.expected, self.local, self.slices)
        self.looks = 0
        self.stop_at = 10**9

    def is_wanted(self) -> bool:
        self.looks += 1
        return self.looks < self.stop_at

    def copy(self) -> bool:
        source = BlockBytes(self.source.reshape(-1), self.source.shape[1])
        target = BlockBytes(self.target.reshape(-1), self.target.shape[1])
        return copy_slices(source, self.remote, target, self.local, self.slices, self.is_wanted)


@pytest.mark.parametrize("is_scattered", [True, False])
@pytest.mark.parametrize("max_copy_bytes", [1, 300, 1000, 8 << 20])
def test_slices_arrive_as_row_by_row(is_scattered: bool, max_copy_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_copy, "MAX_COPY_BYTES", max_copy_bytes)
    case = Case(is_scattered=is_scattered)
    assert case.copy()
    assert np.array_equal(case.target, case.expected)


def test_neighbouring_pairs_are_one_copy() -> None:
    case = Case(is_scattered=False)
    case.copy()
    assert case.looks == 5, "one for each block of the source"


def test_pieces_are_bounded_and_stop_when_nobody_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_copy, "MAX_COPY_BYTES", 1)
    case = Case(is_scattered=True)
    case.stop_at = 3
    assert not case.copy()
    moved = 2 * case.slices.shape.inner * case.slices.shape.row_bytes
    assert 0 < np.count_nonzero(case.target) <= moved


def test_runs_rise_evenly_on_both_sides() -> None:
    assert list(merge_steps([0, 4, 8, 12], [0, 10, 20, 30])) == [Run(0, 0, 4, 10, 4)]
    assert list(merge_steps([0, 4, 8, 9], [0, 10, 20, 30])) == [Run(0, 0, 4, 10, 3), Run(9, 30, 0, 0, 1)]
    assert list(merge_steps([8, 4, 0], [0, 10, 20])) == [Run(8, 0, 0, 0, 1), Run(4, 10, 0, 0, 1), Run(0, 20, 0, 0, 1)]
    assert list(merge_steps([], [])) == []
