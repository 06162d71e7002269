"""How fast a link copies and how long one short copy takes, measured on its copy thread without holding up its reads.

One slice per turn in the queue: a read that is posted while the probe runs waits for one slice at most. Knows
addresses only, no blocks and no peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from kvrelay_transfer.connectors.base import LinkSpeed
from kvrelay_transfer.connectors.copy_thread import Job, copy_span

SLICE_BYTES = 4 << 20  # below a millisecond of copying
SHORT_BYTES = 4 << 10


class BandwidthProbe:
    """Copies one span twice: the first pass only touches the pages, the second one is measured. Then a short one."""

    def __init__(
        self,
        post: Callable[[Job], None],
        source: int,
        size_bytes: int,
        is_wanted: Callable[[], bool],
        report: Callable[[LinkSpeed], None],
    ) -> None:
        """`source` is read only while `is_wanted` says yes, which it is asked on the copy thread. `report` is called
        on that thread too; never, if the probe was not wanted to its end."""
        assert size_bytes > 0, "there is nothing to measure"
        self._post = post
        self._source = source
        self._is_wanted = is_wanted
        self._report = report
        self._scratch = np.empty(size_bytes, np.uint8)
        self._offset = 0
        self._is_second_pass = False
        self._gb_per_s = 0.0
        self._posted_at_s = 0.0  # of the short copy
        self._copied_s = 0.0  # in this pass, without what other jobs took in between

    def start(self) -> None:
        self._post(self._copy_slice)

    def _copy_slice(self) -> None:
        left_bytes = self._scratch.size - self._offset
        destination = int(self._scratch.ctypes.data) + self._offset
        started_s = time.perf_counter()
        if not copy_span(destination, self._source + self._offset, min(SLICE_BYTES, left_bytes), self._is_wanted):
            return
        self._copied_s += time.perf_counter() - started_s
        self._offset += SLICE_BYTES
        if left_bytes <= SLICE_BYTES:
            if self._is_second_pass:
                self._gb_per_s = self._scratch.size / self._copied_s / 1e9
                self._posted_at_s = time.perf_counter()
                self._post(self._copy_short)
                return
            self._is_second_pass, self._offset, self._copied_s = True, 0, 0.0
        self._post(self._copy_slice)

    def _copy_short(self) -> None:
        """With its wait in the queue, as a read has it."""
        size_bytes = min(SHORT_BYTES, self._scratch.size)
        if copy_span(int(self._scratch.ctypes.data), self._source, size_bytes, self._is_wanted):
            self._report(LinkSpeed(self._gb_per_s, time.perf_counter() - self._posted_at_s))
