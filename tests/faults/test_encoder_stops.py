"""An encoder's engine that stands still in front of a live service, a cache that forgets, and a client that is killed.

The answer is that of an undisturbed request, or a typed error comes within seconds; nothing is left anywhere.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import wait_until
from embedding_calls import EmbeddingCalls
from encoder_cluster import CANCEL_DEADLINE_S, EncoderCluster
from encoder_scene import (
    ANSWER_WITHIN_S,
    COPIED,
    ENCODING,
    PULLED,
    PULLED_SOCKET,
    PULLING,
    PULLING_SOCKET,
    Cell,
    Scene,
    await_cancel,
    await_noticed,
    cells,
)
from fault_worker import Part
from picture_questions import new_question
from vision_checkpoints import as_bytes, draw_picture, make_qwen2_5_vl

from kvrelay_core.errors import UnavailableError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240), pytest.mark.full]

PINNED_S = 1.0
NUM_TO_EVICT_ALL = 80  # pictures of 16 KiB each, in a pool of 1 MiB
_seeds = itertools.count(20_000)
CLIENT = """
import sys
from kvrelay_client import Client
with Client(sys.argv[1]) as client, open(sys.argv[2], "rb") as picture:
    client.complete(token_ids=[int(token) for token in sys.argv[3].split(",")], media=[picture.read()], max_tokens=8)
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("encoder-stops") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[EncoderCluster]:
    """Whose encoders pin an embedding for a second."""
    environment = {"STOPPING_ENGINE_PINNED_S": str(PINNED_S)}
    with EncoderCluster(model_dir, connector=request.param, environment=environment) as cluster:
        yield cluster


# ---------------------------------------------------------------------------------------- the engine stops


@cells(stages=(PULLING, PULLING_SOCKET, COPIED, PULLED, PULLED_SOCKET))
async def test_an_engine_that_stops_before_its_embedding_was_read_is_left(cluster: EncoderCluster, cell: Cell) -> None:
    """Its rows may be there; without its word that the ticket is its own they are not used."""
    async with Scene(cluster, cell) as scene:
        encoder = scene.encoder
        encoder.send(signal.SIGSTOP, Part.ENGINE)
        scene.go_on()
        await scene.answer()
        encoder.send(signal.SIGCONT)


@cells(stages=(ENCODING,))
async def test_the_only_engine_is_waited_for(cluster: EncoderCluster, cell: Cell) -> None:
    await asyncio.to_thread(cluster.encoders[1].kill)
    async with Scene(cluster, cell) as scene:
        said = scene.encoder.log_bytes
        await asyncio.to_thread(await_noticed, scene.encoder, said)
        scene.go_on()
        await scene.answer()


@cells(stages=(ENCODING,))
async def test_the_only_engine_is_not_waited_for_too_long(cluster: EncoderCluster, cell: Cell) -> None:
    await asyncio.to_thread(cluster.encoders[1].kill)
    async with Scene(cluster, cell) as scene:
        began_s = time.monotonic()
        async with asyncio.timeout(ANSWER_WITHIN_S):
            error = await scene.asking
        assert isinstance(error, UnavailableError) and "no encoder serves" in error.message, repr(error)
        assert time.monotonic() - began_s < ANSWER_WITHIN_S
        scene.go_on()


# ------------------------------------------------------------------------------------------- the cache


@cells(stages=(PULLING, PULLING_SOCKET))
async def test_what_an_encoder_has_evicted_is_encoded_again(cluster: EncoderCluster, cell: Cell) -> None:
    """Its pins ran out while prefill stood still; others took the room; prefill finds that out by the words."""
    async with Scene(cluster, cell) as scene:
        encoder = scene.encoder
        await asyncio.to_thread(wait_until, lambda: not encoder.load().leases, ANSWER_WITHIN_S, "the lease is over")
        pictures = [as_bytes(draw_picture(64, 64, seed=next(_seeds))) for _ in range(NUM_TO_EVICT_ALL)]
        async with EmbeddingCalls(encoder.address, scene.stopped.address) as calls:
            await calls.evict_all(pictures)
        steps = sum(one.load().steps for one in cluster.encoders)
        scene.go_on()
        await scene.answer()
        assert sum(one.load().steps for one in cluster.encoders) == steps + 1


# ------------------------------------------------------------------------------------------- the client


@cells(stages=(ENCODING,))
async def test_a_client_that_is_killed_leaves_nothing(cluster: EncoderCluster, cell: Cell, tmp_path: Path) -> None:
    question = await asyncio.to_thread(new_question, cluster.target)
    picture = tmp_path / "picture.png"
    picture.write_bytes(question.pictures[0])
    await asyncio.to_thread(cluster.arm, cluster.encoders, cell.point)
    words = [cluster.target, str(picture), ",".join(map(str, question.prompt))]
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, *words)
    stopped = await asyncio.to_thread(cluster.wait_one_stopped, cluster.encoders, cell.point)
    client.kill()
    await client.wait()
    try:
        await asyncio.to_thread(await_cancel, [worker for worker in cluster.workers if worker is not stopped])
    finally:
        stopped.send(signal.SIGCONT)
    await asyncio.to_thread(cluster.assert_nothing_held, CANCEL_DEADLINE_S)
