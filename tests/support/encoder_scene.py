"""A request with an image that stands still at a named stage, in a cluster of encoders, prefill and decode workers.

What a test does to the processes then is its own; afterwards nothing may be held, and everybody serves again.
"""

from __future__ import annotations

import asyncio
import re
import signal
from dataclasses import dataclass

import pytest
from answers import Answer
from cluster import wait_until
from encoder_cluster import CANCEL_DEADLINE_S, EncoderCluster
from fault_worker import FaultProcess
from picture_questions import PictureQuestion, answer_or_error, new_question

from kvrelay.v1.worker_pb2 import WatchLoadResponse
from kvrelay_client import AsyncClient

ANSWER_WITHIN_S = 12.0  # others compute on this machine as well
UNDISTURBED_S = 30.0
NOTICED_WITHIN_S = 3.0  # that an engine stands still
FULL = pytest.mark.full


@dataclass(frozen=True, slots=True)
class Cell:
    stage: str
    role: str  # that comes to `point`
    point: str
    connector: str = "shm"


# Where a request with an image is, by whose engine is stopped where.
ENCODING = Cell("encoding", "encoders", "encode")
ISSUING = Cell("issuing", "encoders", "issue")
PULLING = Cell("pulling", "prefill", "pull")
PULLING_SOCKET = Cell("pulling", "prefill", "pull", "grpc")
COPIED = Cell("copied", "prefill", "copied")
EXPORTED = Cell("copied", "encoders", "export", "grpc")
PULLED = Cell("pulled", "prefill", "pulled")
PULLED_SOCKET = Cell("pulled", "prefill", "pulled", "grpc")
PULLING_NIXL = Cell("pulling", "prefill", "pull", "nixl")
PULLING_UCX = Cell("pulling", "prefill", "pull", "ucx")
STAGES = (
    ENCODING,
    ISSUING,
    PULLING,
    PULLING_SOCKET,
    COPIED,
    EXPORTED,
    PULLED,
    PULLED_SOCKET,
    PULLING_NIXL,
    PULLING_UCX,
)


def cells(*sampled: Cell, stages: tuple[Cell, ...] = STAGES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("cluster", "cell"),
        [
            pytest.param(
                cell.connector, cell, id=f"{cell.stage}-{cell.connector}", marks=() if cell in sampled else FULL
            )
            for cell in stages
        ],
        indirect=["cluster"],
    )


class Scene:
    """One request that stands still at a cell's stage; leaving the block checks the cluster and mends it."""

    def __init__(self, cluster: EncoderCluster, cell: Cell, timeout_s: float = UNDISTURBED_S) -> None:
        self.cluster, self._cell, self._timeout_s = cluster, cell, timeout_s

    async def __aenter__(self) -> Scene:
        self.question = await asyncio.to_thread(new_question, self.cluster.target)
        self.client = AsyncClient(self.cluster.target)
        role: list[FaultProcess] = getattr(self.cluster, self._cell.role)
        await asyncio.to_thread(self.cluster.arm, role, self._cell.point)
        self.asking = asyncio.create_task(answer_or_error(self.client, self.question, self._timeout_s))
        self.stopped = await asyncio.to_thread(self.cluster.wait_one_stopped, role, self._cell.point)
        assert not self.asking.done(), "the request ended before it got there"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                await asyncio.to_thread(self.cluster.assert_nothing_held)
            else:
                print(self.cluster.logs())
        finally:
            self.asking.cancel()
            await self.client.close()
            await asyncio.to_thread(self.cluster.recover)
        if kind is None:
            await check_serves_all(self.cluster)

    @property
    def encoder(self) -> FaultProcess:
        """That has the picture: the only one that holds anything, or is stopped."""
        if self.stopped in self.cluster.encoders:
            return self.stopped
        [found] = [encoder for encoder in self.cluster.encoders if encoder.is_running and encoder.load().leases]
        return found

    def go_on(self) -> None:
        if self.stopped.is_running:
            self.stopped.send(signal.SIGCONT)

    async def answer(self, within_s: float = ANSWER_WITHIN_S) -> Answer:
        async with asyncio.timeout(within_s):
            answer = await self.asking
        assert isinstance(answer, Answer), repr(answer)
        assert answer.token_ids == self.question.answer, "a wrong token"
        return answer


async def ask_undisturbed(client: AsyncClient, question: PictureQuestion) -> None:
    answer = await answer_or_error(client, question, UNDISTURBED_S)
    assert isinstance(answer, Answer), repr(answer)
    assert answer.token_ids == question.answer
    assert answer.end.timing.attempts == 1


async def check_serves_all(cluster: EncoderCluster) -> None:
    """Two new pictures at a time go to both encoders: also the one that was away is asked again."""
    steps = [encoder.load().steps for encoder in cluster.encoders]
    question = await asyncio.to_thread(new_question, cluster.target, len(cluster.encoders))
    async with AsyncClient(cluster.target) as client:
        await ask_undisturbed(client, question)
    assert all(encoder.load().steps > before for encoder, before in zip(cluster.encoders, steps, strict=True))
    await asyncio.to_thread(cluster.assert_nothing_held)


def has_requests(load: WatchLoadResponse) -> bool:
    return bool(load.streams or load.requests_waiting or load.requests_running)


def await_cancel(workers: list[FaultProcess]) -> None:
    names = ", ".join(worker.name for worker in workers)
    wait_until(
        lambda: not any(has_requests(worker.load()) for worker in workers),
        CANCEL_DEADLINE_S,
        f"the cancel at each of {names}",
    )


def await_noticed(encoder: FaultProcess, since_bytes: int) -> None:
    """By its own service."""
    told = re.compile(r"the engine has not moved for ([0-9.]+) s")
    wait_until(lambda: told.search(encoder.said(since_bytes)) is not None, ANSWER_WITHIN_S, encoder.log)
    [silent_s, *_] = told.findall(encoder.said(since_bytes))
    assert float(silent_s) <= NOTICED_WITHIN_S
