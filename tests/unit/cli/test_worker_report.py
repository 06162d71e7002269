"""`kvrelay doctor --target`: what a worker says of itself, and who else may listen there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from fake_worker import FakePrefill

from kvrelay.v1 import inference_pb2, worker_pb2
from kvrelay.v1.common_pb2 import EmbeddingLayout
from kvrelay.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from kvrelay_cli.main import main
from kvrelay_cli.tier_report import tier_lines
from kvrelay_cli.worker_report import ask_worker, fields_of, handoff_line, lines_of_worker, link_lines
from kvrelay_core.errors import ConfigError, WorkerLostError

LINK = {
    "peer": "10.0.0.7:50061", "connector": "shm", "probed_gb_per_s": 8.5, "mean_read_s": 0.0125, "reads": 40,
    "bytes": 64 << 20, "reading_s": 0.5, "failed_reads": 1, "stale_reads": 2, "fallbacks": 3, "below_floor": False,
    "spans": 100, "current": True, "probed_latency_s": 4e-5, "floor_gb_per_s": 1.0,
}  # fmt: skip


@pytest.fixture
async def worker() -> AsyncIterator[FakePrefill]:
    fake = FakePrefill("prefill-0")
    await fake.start()
    fake.loads.put_nowait(
        worker_pb2.WatchLoadResponse(
            blocks_total=64, blocks_in_use=3, blocks_pinned=2, leases=1, handoff_bytes=3 << 20, handoff_s=0.001
        )
    )
    yield fake
    await fake.stop()


async def test_a_worker_says_who_it_is_and_what_it_holds(worker: FakePrefill) -> None:
    answer = await asyncio.to_thread(ask_worker, worker.address)
    text = "\n".join(lines_of_worker(answer))
    assert text.startswith(f"prefill-0 at {worker.address}: prefill worker")
    assert "float32, 2 layers" in text and "64 tokens a block" in text
    assert "blocks: 64, of these 3 in use, 0 cached, 2 pinned, 0 quarantined" in text
    assert "hand-offs: 3.0 MiB in 0.001 s, 3.15 GB/s; 1 leases" in text
    assert "links: none reported" in text


async def test_an_encoder_shows_its_cache() -> None:
    described = worker_pb2.DescribeResponse(
        role=worker_pb2.ROLE_ENCODER, device="cpu", connectors=["shm", "grpc"],
        embedding_layouts=[EmbeddingLayout(dtype="bfloat16", hidden_size=2048, block_tokens=16)],
    )  # fmt: skip
    load = worker_pb2.WatchLoadResponse(
        blocks_total=4096, blocks_cached=600, blocks_pinned=16, leases=2, embedding_items=70, embedding_hits=12,
        embeddings_evicted=3, steps=40,
    )  # fmt: skip
    text = "\n".join(lines_of_worker({"worker": fields_of(described), "load": fields_of(load)}))
    assert "layout: bfloat16, embeddings of 2048, 16 tokens a block" in text
    assert "cache: 70 images in 600 of 4096 blocks, 16 pinned by 2 leases; 12 found in it, 3 evicted" in text
    assert "images: 0 waiting; 40 steps of the tower" in text
    assert "tokens a request" not in text and "hand-offs" not in text


async def test_the_same_as_json(worker: FakePrefill, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(main, ["doctor", "--target", worker.address, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["worker"]["role"] == "prefill" and answer["worker"]["engine_epoch"] == b"prefill-0/1".hex()
    assert answer["load"]["handoff_bytes"] == 3 << 20


def test_a_hand_off_that_took_no_time_has_no_speed() -> None:
    load = {"handoff_bytes": 0, "handoff_s": 0.0, "leases": 0, "transfers": 0, "stale_reads": 0, "expired_leases": 0}
    assert handoff_line({**load, "prefix_blocks_pulled": 0}).startswith("hand-offs: 0.0 MiB in 0.000 s; 0 leases")


def test_a_line_for_each_link() -> None:
    slow = {**LINK, "peer": "10.0.0.8:50061", "reading_s": 0.0, "probed_gb_per_s": 0.0, "probed_latency_s": 0.0}
    slow.update(connector="grpc", below_floor=True, current=False)
    header, first, second = link_lines([LINK, slow])
    assert header.split()[:2] == ["peer", "connector"]
    speeds = ["8.50", "40", "0.13", "12.500"]
    assert first.split() == ["10.0.0.7:50061", "shm", *speeds, "40", "64.0", "2.5", "1", "2", "3"]
    assert second.split()[2:5] == ["-", "-", "-"] and second.endswith("not in use, BELOW ITS FLOOR of 1 GB/s")


def test_the_proto_has_what_a_line_shows() -> None:
    names = {field.name for field in worker_pb2.LinkReport.DESCRIPTOR.fields}
    assert names == set(LINK)


def test_a_line_for_each_tier() -> None:
    host = worker_pb2.TierReport(tier="host", parts=3, used_bytes=1 << 30, capacity_bytes=4 << 30, hits=5, gb_per_s=9.5)
    redis = worker_pb2.TierReport(tier="redis", errors=7, left_alone=True)
    header, first, second = tier_lines([fields_of(host), fields_of(redis)])
    assert header.split()[:2] == ["tier", "parts"]
    assert first.split()[:7] == ["host", "3", "1.00", "4.00", "5", "0", "9.50"]
    assert second.split()[:4] == ["redis", "0", "0.00", "-"] and second.endswith("LEFT ALONE after errors")


class RouterLike(InferenceServiceServicer):
    def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

    def GetModelInfo(self, request: inference_pb2.GetModelInfoRequest, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")


@pytest.fixture
def server() -> Iterator[tuple[grpc.Server, str]]:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        yield server, f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.stop(0).wait()


def test_a_router_is_told_as_one(server: tuple[grpc.Server, str], capsys: pytest.CaptureFixture[str]) -> None:
    add_InferenceServiceServicer_to_server(RouterLike(), server[0])
    server[0].start()
    assert main(["doctor", "--target", server[1]]) == 2
    assert f"{server[1]} is a router, and holds no KV; ask its workers" in capsys.readouterr().err


def test_some_other_server_is_told_as_such(server: tuple[grpc.Server, str]) -> None:
    server[0].start()
    with pytest.raises(ConfigError, match="is no KVRelay worker"):
        ask_worker(server[1])


def test_nobody_there_is_a_lost_worker(server: tuple[grpc.Server, str]) -> None:
    server[0].start()
    server[0].stop(0).wait()
    with pytest.raises(WorkerLostError, match=server[1]):
        ask_worker(server[1])
