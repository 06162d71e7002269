"""Faults of encoders, and of prefill while it reads from one: the answer is that of an undisturbed request, or a typed
error comes within seconds; nothing is left anywhere, and whoever was restarted is taken back.

Each request is about a picture that nobody has seen (`picture_questions`).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from encoder_cluster import CANCEL_DEADLINE_S, EncoderCluster
from encoder_scene import (
    ANSWER_WITHIN_S,
    ENCODING,
    ISSUING,
    PULLING,
    PULLING_SOCKET,
    Cell,
    Scene,
    await_cancel,
    await_noticed,
    cells,
)
from vision_checkpoints import make_qwen2_5_vl

from kvrelay_core.errors import KvRelayError, UnavailableError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

WAITED_FOR_S = 5.0  # an encoder, when none serves


class KeptCluster:
    """One cluster at a time, until one of another connector is asked for."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self._connector = ""
        self._stack = ExitStack()
        self._cluster: EncoderCluster | None = None

    def of(self, connector: str) -> EncoderCluster:
        if self._cluster is None or connector != self._connector:
            self.close()
            self._cluster = self._stack.enter_context(EncoderCluster(self._model_dir, connector=connector))
            self._connector = connector
        return self._cluster

    def close(self) -> None:
        self._cluster = None
        self._stack.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("encoder-faults") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def kept_cluster(model_dir: Path) -> Iterator[KeptCluster]:
    kept = KeptCluster(model_dir)
    yield kept
    kept.close()


@pytest.fixture
def cluster(request: pytest.FixtureRequest, kept_cluster: KeptCluster) -> EncoderCluster:
    """By the connector of embeddings. pytest itself would start one for every test that has parameters of its own."""
    return kept_cluster.of(request.param)


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


@cells(ENCODING, stages=(ENCODING, ISSUING))
async def test_an_engine_that_stops_is_left_for_another_encoder(cluster: EncoderCluster, cell: Cell) -> None:
    async with Scene(cluster, cell) as scene:
        said = scene.encoder.log_bytes
        await scene.answer()
        await asyncio.to_thread(await_noticed, scene.encoder, said)
        scene.go_on()


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
