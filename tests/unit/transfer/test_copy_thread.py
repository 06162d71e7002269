"""Merged runs and interruptible copies."""

from __future__ import annotations

import threading
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_transfer.connectors import copy_thread
from kvrelay_transfer.connectors.copy_thread import CopyThread, copy_span, merge_runs


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=20))
def test_runs_cover_the_same_pairs_in_order_and_are_maximal(pairs: list[tuple[int, int]]) -> None:
    runs = merge_runs([remote for remote, _ in pairs], [local for _, local in pairs])
    covered = [(remote + step, local + step) for remote, local, count in runs for step in range(count)]
    assert covered == pairs
    for (remote, local, count), (next_remote, next_local, _) in pairwise(runs):
        assert (remote + count, local + count) != (next_remote, next_local)


def test_contiguous_blocks_are_one_run() -> None:
    assert merge_runs(range(5, 105), range(20, 120)) == [(5, 20, 100)]


def test_a_copy_stops_where_it_is_no_longer_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_thread, "MAX_COPY_BYTES", 10)
    source, destination = np.arange(1, 36, dtype=np.uint8), np.zeros(35, np.uint8)
    answers = iter([True, True, False])
    addresses = int(destination.ctypes.data), int(source.ctypes.data)
    assert not copy_span(*addresses, 35, lambda: next(answers))
    assert np.array_equal(destination[:20], source[:20]) and not destination[20:].any()
    assert copy_span(*addresses, 35, lambda: True)
    assert np.array_equal(destination, source)


def test_jobs_run_in_order_and_all_before_close_returns() -> None:
    done: list[int] = []
    gate = threading.Event()
    thread = CopyThread("test-copy")
    thread.post(lambda: done.append(int(gate.wait(timeout=10))))
    for number in range(2, 6):
        thread.post(partial(done.append, number))
    gate.set()
    thread.close()
    assert done == [1, 2, 3, 4, 5]
