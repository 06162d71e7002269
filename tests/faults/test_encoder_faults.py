"""Faults of encoders, and of prefill while it reads from one: the answer is that of an undisturbed request, or a typed
error comes within seconds; nothing is left anywhere, and whoever was restarted is taken back.

Each request is about a picture that nobody has seen (`picture_questions`).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from answers import Answer
from cluster import wait_until
from encoder_cluster import CANCEL_DEADLINE_S, EncoderCluster
from fault_worker import FaultProcess
from picture_questions import PictureQuestion, answer_or_error, new_question
from vision_checkpoints import make_qwen2_5_vl

from kvrelay.v1.worker_pb2 import WatchLoadResponse
from kvrelay_client import AsyncClient
from kvrelay_core.errors import KvRelayError, UnavailableError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

ANSWER_WITHIN_S = 12.0  # others compute on this machine as well
UNDISTURBED_S = 30.0
WAITED_FOR_S = 5.0  # an encoder, when none serves
FULL = pytest.mark.full


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("encoder-faults") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[EncoderCluster]:
    """By the connector of embeddings; tests of one connector are run one after the other."""
    with EncoderCluster(model_dir, connector=request.param) as cluster:
        yield cluster


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
STAGES = (ENCODING, ISSUING, PULLING, PULLING_SOCKET, COPIED, EXPORTED, PULLED, PULLED_SOCKET)


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


# ------------------------------------------------------------------------------------------ encoder killed


@cells(ENCODING)
async def test_with_two_encoders_the_other_one_takes_over(cluster: EncoderCluster, cell: Cell) -> None:
    async with Scene(cluster, cell) as scene:
        await asyncio.to_thread(scene.encoder.kill)
        scene.go_on()
        await scene.answer()


@cells(stages=(ENCODING, PULLING))
async def test_the_only_encoder_is_waited_for(cluster: EncoderCluster, cell: Cell) -> None:
    """What was killed is started again meanwhile, as its supervisor would; when that takes too long, we are told so."""
    await asyncio.to_thread(cluster.encoders[1].kill)
    async with Scene(cluster, cell) as scene:
        await asyncio.to_thread(scene.encoder.kill)
        scene.go_on()
        killed_s = time.monotonic()
        await asyncio.to_thread(cluster.restart, cluster.encoders[0])
        restarted_in_s = time.monotonic() - killed_s
        async with asyncio.timeout(ANSWER_WITHIN_S):
            outcome = await scene.asking
        if isinstance(outcome, UnavailableError) and restarted_in_s > WAITED_FOR_S:
            assert "no encoder serves" in outcome.message
        else:
            await scene.answer()


@cells(stages=(ENCODING,))
async def test_an_image_that_encoders_die_of_is_given_up(cluster: EncoderCluster, cell: Cell) -> None:
    async with Scene(cluster, cell) as scene:
        [other] = scene.cluster.others(scene.stopped)
        other.arm("encode")
        await asyncio.to_thread(scene.stopped.kill)
        await asyncio.to_thread(other.wait_stopped, ANSWER_WITHIN_S)
        await asyncio.to_thread(other.kill)
        killed_s = time.monotonic()
        error = await scene.asking
        assert isinstance(error, KvRelayError) and "2 encoders were lost" in error.message, repr(error)
        assert time.monotonic() - killed_s < 3


# ---------------------------------------------------------------------------------------- encoder stopped


@cells(ENCODING)
async def test_a_stopped_encoder_is_left_for_the_other_one(cluster: EncoderCluster, cell: Cell) -> None:
    """Service and engine stand still; what went on elsewhere meanwhile is not disturbed when they go on."""
    async with Scene(cluster, cell) as scene:
        encoder = scene.encoder
        encoder.send(signal.SIGSTOP)
        if scene.stopped is not encoder:
            scene.go_on()
        await scene.answer()
        encoder.send(signal.SIGCONT)


# ----------------------------------------------------------------------------------------- prefill killed


@cells(stages=(PULLING_SOCKET,))
async def test_pins_of_a_dead_prefill_worker_are_freed(cluster: EncoderCluster, cell: Cell) -> None:
    async with Scene(cluster, cell) as scene:
        encoder = scene.encoder
        assert encoder.load().leases == 1
        await asyncio.to_thread(scene.stopped.kill)
        await scene.answer()


# ------------------------------------------------------------------------------------------------- cancel


@cells(ENCODING, PULLING, stages=(ENCODING, PULLING))
async def test_a_cancel_frees_everything(cluster: EncoderCluster, cell: Cell) -> None:
    """It is there before the engine goes on."""
    async with Scene(cluster, cell) as scene:
        running = [worker for worker in scene.cluster.workers if worker is not scene.stopped]
        scene.asking.cancel()
        await asyncio.wait([scene.asking])
        await asyncio.to_thread(await_cancel, running)
        scene.go_on()
        await asyncio.to_thread(scene.cluster.assert_nothing_held, CANCEL_DEADLINE_S)


def has_requests(load: WatchLoadResponse) -> bool:
    return bool(load.streams or load.requests_waiting or load.requests_running)


def await_cancel(workers: list[FaultProcess]) -> None:
    names = ", ".join(worker.name for worker in workers)
    wait_until(
        lambda: not any(has_requests(worker.load()) for worker in workers),
        CANCEL_DEADLINE_S,
        f"the cancel at each of {names}",
    )
