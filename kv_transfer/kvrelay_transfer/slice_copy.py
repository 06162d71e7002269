"""Copies the slices of blocks in host memory: strided copies of numpy, which releases the GIL for them.

Pairs that follow each other at equal distances on both sides are one copy, as merged runs of whole blocks are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvrelay_transfer.connectors.base import Blocks, BlockSlices, as_blocks
from kvrelay_transfer.connectors.copy_thread import MAX_COPY_BYTES

ByteArray = npt.NDArray[np.uint8]


class BlockBytes(NamedTuple):
    """Blocks of `block_bytes` one after another in `data` [size_bytes]."""

    data: ByteArray
    block_bytes: int


class Run(NamedTuple):
    """`num_pairs` pairs, `remote_step` and `local_step` bytes apart; the first begins at `remote` and `local`."""

    remote: int
    local: int
    remote_step: int
    local_step: int
    num_pairs: int


def copy_slices(
    source: BlockBytes,
    remote_blocks: Sequence[int] | Blocks,
    destination: BlockBytes,
    local_blocks: Sequence[int] | Blocks,
    slices: BlockSlices,
    is_wanted: Callable[[], bool] = lambda: True,
) -> bool:
    """False when it stopped early because `is_wanted` said no, which is asked about once a millisecond of copying.

    The caller has checked that blocks and slices lie within both sides.
    """
    shape = slices.shape
    pairs_per_piece = max(1, MAX_COPY_BYTES // shape.size_bytes)
    rows_per_piece = max(1, MAX_COPY_BYTES // (shape.inner * shape.row_bytes))
    remote = _offsets(remote_blocks, source.block_bytes, slices.remote_offsets)
    local = _offsets(local_blocks, destination.block_bytes, slices.local_offsets)
    for run in merge_steps(remote, local):
        for pair in range(0, run.num_pairs, pairs_per_piece):
            count = min(pairs_per_piece, run.num_pairs - pair)
            for row in range(0, shape.outer, rows_per_piece):
                outer = min(rows_per_piece, shape.outer - row)
                if not is_wanted():
                    return False
                size = (count, outer, shape.inner, shape.row_bytes)
                begin = run.remote + pair * run.remote_step + row * shape.remote_outer_stride
                strides = (run.remote_step, shape.remote_outer_stride, shape.remote_inner_stride, 1)
                read = np.ndarray(size, np.uint8, source.data, begin, strides)
                begin = run.local + pair * run.local_step + row * shape.local_outer_stride
                strides = (run.local_step, shape.local_outer_stride, shape.local_inner_stride, 1)
                np.copyto(np.ndarray(size, np.uint8, destination.data, begin, strides), read)
    return True


def merge_steps(remote: Sequence[int], local: Sequence[int]) -> Iterator[Run]:
    """The longest runs of pairs at equal, rising distances on both sides, taken from the front."""
    first = 0
    while first < len(remote):
        remote_step = local_step = 0
        end = first + 1
        if end < len(remote) and remote[end] > remote[first] and local[end] > local[first]:
            remote_step, local_step = remote[end] - remote[first], local[end] - local[first]
            while (
                end < len(remote)
                and remote[end] - remote[end - 1] == remote_step
                and local[end] - local[end - 1] == local_step
            ):
                end += 1
        yield Run(remote[first], local[first], remote_step, local_step, end - first)
        first = end


def _offsets(blocks: Sequence[int] | Blocks, block_bytes: int, offsets: Blocks) -> list[int]:
    assert len(blocks) == len(offsets), "one offset for each block"
    numbers: list[int] = (as_blocks(blocks) * block_bytes + offsets).tolist()
    return numbers
