"""One thread that copies memory with the GIL released, for transfers that the step loop only posts and polls.

It sleeps in a C queue; a job is a handful of memmove calls, none longer than a few milliseconds, between which
it looks whether the job is still wanted.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

# Between two looks at abort and deadline; about a millisecond of copying.
MAX_COPY_BYTES = 8 << 20

Job = Callable[[], None]


class CopyThread:
    """Runs jobs one after another, in the order in which they were posted."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, job: Job) -> None:
        """`job` must not raise."""
        self._jobs.put(job)

    def close(self) -> None:
        """Returns when the jobs posted before are over."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def copy_span(destination: int, source: int, size_bytes: int, is_wanted: Callable[[], bool]) -> bool:
    """Copies between addresses; False when it stopped early because `is_wanted` said no."""
    for offset in range(0, size_bytes, MAX_COPY_BYTES):
        if not is_wanted():
            return False
        # ctypes gives the GIL back for the call.
        ctypes.memmove(destination + offset, source + offset, min(MAX_COPY_BYTES, size_bytes - offset))
    return True


def merge_runs(remote_blocks: Sequence[int], local_blocks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(remote, local, count) of the spans in which both sides are contiguous."""
    runs: list[tuple[int, int, int]] = []
    for remote, local in zip(remote_blocks, local_blocks, strict=True):
        if runs:
            first_remote, first_local, count = runs[-1]
            if remote == first_remote + count and local == first_local + count:
                runs[-1] = (first_remote, first_local, count + 1)
                continue
        runs.append((remote, local, 1))
    return runs
