"""One thread that owns what only one thread may use: it runs jobs, and in between looks after what is under way.

It sleeps in a C queue, as long as `look_after` says, to within microseconds. Knows nothing of what it looks after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from queue import Empty, SimpleQueue
from typing import TypeVar

from kvrelay_core.errors import TransferError
from kvrelay_transfer.naps import allow_naps

Result = TypeVar("Result")


class AgentThread:
    def __init__(self, name: str, look_after: Callable[[], float]) -> None:
        """`look_after` must not raise; it returns after how many seconds it wants to be called again at the latest."""
        self._look_after = look_after
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], object]) -> None:
        """`job` must not raise. It is looked after right behind it."""
        self._jobs.put(job)

    def call(self, function: Callable[[], Result], timeout_s: float) -> Result:
        """Raises what `function` raises, or TransferError when the thread did not come to it in time."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(run)
        try:
            return future.result(timeout_s)
        except FutureTimeoutError:
            if future.cancel():
                raise TransferError(f"{self._thread.name} was busy for {timeout_s:g} s") from None
            return future.result()  # it has begun: a few milliseconds more

    def close(self) -> None:
        """Returns when the jobs posted before are over."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        allow_naps()
        while True:
            try:
                job = self._jobs.get(timeout=self._look_after())
            except Empty:
                continue
            if job is None:
                return
            job()
