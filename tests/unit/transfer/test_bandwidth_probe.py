"""The probe of a link takes turns with the reads, and stops where its source goes away."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from kvrelay_transfer.connectors import bandwidth_probe
from kvrelay_transfer.connectors.bandwidth_probe import BandwidthProbe
from kvrelay_transfer.connectors.base import LinkSpeed
from kvrelay_transfer.connectors.copy_thread import Job


class ProbeBench:
    """A queue of jobs that the test runs one by one."""

    def __init__(self, size_bytes: int) -> None:
        self.jobs: deque[Job] = deque()
        self.source = np.ones(size_bytes, np.uint8)
        self.is_wanted = True
        self.speeds: list[LinkSpeed] = []
        address = int(self.source.ctypes.data)
        probe = BandwidthProbe(self.jobs.append, address, size_bytes, lambda: self.is_wanted, self.speeds.append)
        probe.start()

    def run_all(self) -> int:
        """Returns how many jobs there were."""
        count = 0
        while self.jobs:
            self.jobs.popleft()()
            count += 1
        return count


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_probe, "SLICE_BYTES", 100)


@pytest.mark.parametrize(("size_bytes", "num_slices"), [(1, 1), (100, 1), (101, 2), (1000, 10)])
def test_two_passes_and_a_short_copy_give_one_speed(size_bytes: int, num_slices: int) -> None:
    bench = ProbeBench(size_bytes)
    assert bench.run_all() == 2 * num_slices + 1
    (speed,) = bench.speeds
    assert speed.gb_per_s > 0.0 and 0.0 < speed.latency_s < 1.0


def test_a_read_posted_meanwhile_waits_for_one_slice_at_most() -> None:
    bench = ProbeBench(1000)
    bench.jobs.popleft()()
    reads: list[int] = []
    bench.jobs.append(lambda: reads.append(len(bench.speeds)))
    bench.jobs.popleft()()
    bench.jobs.popleft()()
    assert reads == [0], "it ran long before the probe was over"
    bench.run_all()
    assert len(bench.speeds) == 1


def test_a_probe_that_is_not_wanted_any_more_posts_nothing() -> None:
    bench = ProbeBench(1000)
    bench.jobs.popleft()()
    bench.is_wanted = False
    assert bench.run_all() == 1
    assert bench.speeds == []
