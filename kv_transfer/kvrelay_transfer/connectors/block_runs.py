"""Pairs of blocks that are neighbours on both sides, found by array operations: no loop over blocks."""

from __future__ import annotations

import numpy as np

from kvrelay_transfer.connectors.base import Blocks


def merge_runs(remote: Blocks, local: Blocks) -> tuple[Blocks, Blocks, Blocks]:
    """(remote, local, counts) of the spans in which both sides are contiguous. There is one pair at least."""
    breaks = _breaks(remote, local)
    starts = np.concatenate(([0], breaks))
    return remote[starts], local[starts], np.diff(np.concatenate((starts, [len(remote)])))


def count_runs(remote: Blocks, local: Blocks) -> int:
    """How many spans `merge_runs` finds; none in no pairs."""
    return len(_breaks(remote, local)) + 1 if len(remote) else 0


def _breaks(remote: Blocks, local: Blocks) -> Blocks:
    """Where a span begins, but for the first."""
    breaks: Blocks = np.flatnonzero((np.diff(remote) != 1) | (np.diff(local) != 1)) + 1
    return breaks
