"""Pairs of blocks that are neighbours on both sides, found by array operations: no loop over blocks."""

from __future__ import annotations

import numpy as np

from kvrelay_transfer.connectors.base import Blocks


def merge_runs(remote: Blocks, local: Blocks) -> tuple[Blocks, Blocks, Blocks]:
    """(remote, local, counts) of the spans in which both sides are contiguous. There is one pair at least."""
    bounds = np.concatenate(((0,), _breaks(remote, local), (len(remote),)))
    starts = bounds[:-1]
    return remote[starts], local[starts], bounds[1:] - starts


def count_runs(remote: Blocks, local: Blocks) -> int:
    """How many spans `merge_runs` finds; none in no pairs."""
    return len(_breaks(remote, local)) + 1 if len(remote) else 0


def _breaks(remote: Blocks, local: Blocks) -> Blocks:
    """Where a span begins, but for the first."""
    is_break = (remote[1:] - remote[:-1] != 1) | (local[1:] - local[:-1] != 1)
    breaks: Blocks = is_break.nonzero()[0] + 1
    return breaks
