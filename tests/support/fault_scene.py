"""One cell of the matrix while it runs: the pair that the request is on, where it was stopped, what was seen."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from answers import Answer, ask
from fault_cluster import FaultCluster, Pair
from fault_matrix import Notice, Stage
from fault_worker import FaultProcess, Part

from kvrelay_client import AsyncClient
from kvrelay_core.errors import KvRelayError

STAGE_DEADLINE_S = 20.0
POLL_S = 0.02
POLLED_WITHIN_S = 10.0
# The stated bounds are those of an idle machine; here others compute as well.
BUSY_S = 4.0
BUSY_NOTICE_S = 1.0
Point = tuple[str, str, int]  # whose engine is stopped, where, and at which time of passing
# Of the eleven steps of a prompt. During a pull the source stands still too: else it might be through with it before
# the fault comes, or before the reader has followed.
STEPS_BEFORE = 8
TOKENS_BEFORE = 5
POINTS: dict[Stage, tuple[Point, ...]] = {
    Stage.BEFORE_ACCEPT: (("source", "accept", 1),),
    Stage.DURING_PULL: (("reader", "read", 1), ("source", "sealed", STEPS_BEFORE)),
    Stage.AFTER_LAST_PULL: (("reader", "arrive", 1),),
    Stage.DURING_DECODE: (("reader", "token", TOKENS_BEFORE),),
}
# Between data and words: which side's engine has to be stopped where, by connector.
BETWEEN_DATA_AND_WORDS: dict[str, Point] = {
    "shm": ("reader", "copied", 1),
    "grpc": ("source", "export", 1),
    "nixl": ("reader", "copied", 1),
    "ucx": ("source", "export", 1),
}


Question = tuple[list[int], list[int]]  # a prompt and its answer


def cell_salt() -> str:
    """KV of one request is never found by another."""
    return f"{time.monotonic_ns()}"


def wait_for(condition: Callable[[], object], what: str) -> None:
    give_up_s = time.monotonic() + POLLED_WITHIN_S
    while not condition():
        assert time.monotonic() < give_up_s, f"not within {POLLED_WITHIN_S:g} s: {what}"
        time.sleep(POLL_S)


@dataclass
class Scene:
    cluster: FaultCluster
    pair: Pair
    connector: str
    stage: Stage
    frozen: set[str] = field(default_factory=set)  # processes that are not to go on yet
    started_s: float = 0.0  # of the fault
    victim: str = ""  # the process that is gone, for whoever should notice
    _said: dict[str, int] = field(default_factory=dict)  # log sizes before
    _counts: dict[Notice, int] = field(default_factory=dict)

    @property
    def source(self) -> FaultProcess:
        return self.cluster.prefill[self.pair.source]

    @property
    def reader(self) -> FaultProcess:
        return self.cluster.decode[self.pair.reader]

    @property
    def spare_source(self) -> FaultProcess:
        return self.cluster.prefill[self.pair.other.source]

    @property
    def spare_reader(self) -> FaultProcess:
        return self.cluster.decode[self.pair.other.reader]

    # --------------------------------------------------------------------------------------- to the stage

    def arm(self, points: tuple[Point, ...] | None = None) -> None:
        """`points` where the fault's moment is not the stage's."""
        self._said = {process.name: process.log_bytes for process in (self.cluster.router, *self.cluster.workers)}
        self._counts = {notice: self._count(notice) for notice in (Notice.LEASE, Notice.CHECK)}
        self.stopped: list[FaultProcess] = []
        for role, point, count in points or POINTS[self.stage]:
            process: FaultProcess = getattr(self, role)
            process.arm(point, count)
            self.stopped.append(process)
            if point == "sealed":
                process.arm("alone")

    def stall_reads(self) -> None:
        """Before the request: nothing is read until `arm_then_read`."""
        self.reader.arm("stall")

    def arm_then_read(self, point: Point) -> None:
        """Once the source has computed all: what is done to its memory then is no fault of its own."""
        wait_for(lambda: self.reader.load().transfers, "a read that stalls")
        self.wait_source_idle()
        self.arm((point,))
        self.reader.disarm("stall")

    def wait_stage(self) -> None:
        for process in self.stopped:
            process.wait_stopped(STAGE_DEADLINE_S)
            process.disarm("alone")
        self.started_s = time.monotonic()

    def go_on(self) -> None:
        """Unless the fault is that it does not."""
        for process in self.stopped:
            if process.name not in self.frozen and process.is_running:
                process.send(signal.SIGCONT, Part.ENGINE)

    def freeze(self, process: FaultProcess, part: Part) -> None:
        process.send(signal.SIGSTOP, part)
        if part is not Part.SERVICE:
            self.frozen.add(process.name)
        self.victim = process.name

    def thaw(self, process: FaultProcess) -> None:
        self.frozen.discard(process.name)
        process.send(signal.SIGCONT)

    def wait_source_idle(self) -> None:
        """It has computed all, and nothing but the ticket holds the blocks."""

        def is_idle() -> bool:
            load = self.source.load()
            return not load.requests_running and not load.requests_waiting

        wait_for(is_idle, f"{self.source.name} through with its prompt")

    # -------------------------------------------------------------------------------------------- noticed

    def await_notice(self, notice: Notice, deadline_s: float) -> float:
        """Seconds from the fault until somebody noticed."""
        while not self._has_noticed(notice):
            elapsed_s = time.monotonic() - self.started_s
            assert elapsed_s < deadline_s, f"not noticed by the {notice.value} within {elapsed_s:.1f} s"
            time.sleep(POLL_S)
        return time.monotonic() - self.started_s

    def _has_noticed(self, notice: Notice) -> bool:
        match notice:
            case Notice.ROUTER:
                return f"worker {self.victim} is lost" in self._said_since(self.cluster.router)
            case Notice.READER:
                return "is lost, it may come back" in self._said_since(self.reader)
            case Notice.SOURCE:
                return "is lost, its KV stays pinned" in self._said_since(self.source)
            case Notice.SERVICE:
                return "those who wait for it are told" in self._said_since(self.source)
            case Notice.LEASE | Notice.CHECK:
                return self._count(notice) > self._counts[notice]

    def _said_since(self, process: FaultProcess) -> str:
        return process.said(self._said[process.name])

    def _count(self, notice: Notice) -> int:
        return self.source.load().expired_leases if notice is Notice.LEASE else self.reader.load().stale_reads


class Asking:
    """A request to the router, streamed by a thread; the test meanwhile does what it likes."""

    def __init__(self, pool: ThreadPoolExecutor, target: str, prompt: list[int], max_tokens: int, salt: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._ask(target, prompt, max_tokens, salt))
        self._future: Future[Answer | KvRelayError] = pool.submit(self._run)

    def result(self, timeout_s: float) -> Answer | KvRelayError:
        return self._future.result(timeout_s)

    def cancel(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)

    @property
    def is_over(self) -> bool:
        return self._future.done()

    def _run(self) -> Answer | KvRelayError:
        try:
            return self._loop.run_until_complete(self._task)
        finally:
            self._loop.close()

    @staticmethod
    async def _ask(target: str, prompt: list[int], max_tokens: int, salt: str) -> Answer | KvRelayError:
        try:
            async with AsyncClient(target) as client:
                return await ask(
                    client, token_ids=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True, cache_salt=salt
                )
        except KvRelayError as error:
            return error
