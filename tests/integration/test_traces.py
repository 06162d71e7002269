"""One trace per request over all processes, as an OpenTelemetry collector receives it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from cluster import Cluster
from made_checkpoints import CheckpointMaker
from oracle import make_prompt
from trace_collector import CollectedSpan, TraceCollector

from kvrelay.v1 import common_pb2
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TRACE_ID = bytes.fromhex("4bf92f3577b34da6a3ce929d0e0e4736")
CLIENT_SPAN = bytes.fromhex("00f067aa0ba902b7")
SECOND_ID = bytes.fromhex("0af7651916cd43dd8448eb211c80319c")


def generate(target: str, prompt: list[int], trace_id: bytes = b"") -> list[int]:
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
    metadata = (("traceparent", f"00-{trace_id.hex()}-{CLIENT_SPAN.hex()}-01"),) if trace_id else ()
    with grpc.insecure_channel(target) as channel:
        stream = InferenceServiceStub(channel).Generate(request, timeout=30, metadata=metadata)
        return [token_id for response in stream for token_id in response.delta.token_ids]


def test_a_request_is_one_trace_with_a_span_for_its_transfers(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "true")
    prompt = make_prompt(200, 100, seed=3)
    with TraceCollector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        flags: dict[str, Any] = {"connector": "shm", "placement": "round_robin", "block_tokens": 16, "prefix_wait": 10}
        with Cluster(checkpoint("llama3_scaled"), prefill=2, **flags) as cluster:
            while not all(load.steps for load in cluster.loads().values()):
                generate(cluster.target, [1, 2, 3])  # a cluster is ready with the first worker of each role
            answer = generate(cluster.target, prompt, TRACE_ID)
            generate(cluster.target, [*prompt, *answer, 1, 2, 3], SECOND_ID)
            cluster.assert_no_leaks()
    first = [span for span in collector.spans if span.trace_id == TRACE_ID]
    second = [span for span in collector.spans if span.trace_id == SECOND_ID]
    check_first_turn(first)
    check_second_turn(second)


def check_first_turn(spans: list[CollectedSpan]) -> None:
    by_name = {span.name: span for span in spans}
    assert sorted(span.name for span in spans) == ["decode", "generate", "kv_transfer", "prefill"]
    generate, prefill, decode = by_name["generate"], by_name["prefill"], by_name["decode"]
    transfer = by_name["kv_transfer"]
    assert [span.service for span in (generate, prefill, decode, transfer)] == [
        "kvrelay-router", "kvrelay-prefill", "kvrelay-decode", "kvrelay-decode"
    ]  # fmt: skip
    assert generate.parent_id == CLIENT_SPAN
    assert prefill.parent_id == decode.parent_id == generate.span_id
    assert transfer.parent_id == decode.span_id
    assert transfer.attributes["kvrelay.connector"] == "shm"
    assert transfer.attributes["kvrelay.blocks_pulled"] == 7
    assert transfer.attributes["kvrelay.size_bytes"] > 0 and transfer.attributes["kvrelay.gb_per_s"] > 0
    assert prefill.attributes["kvrelay.prompt_tokens"] == 100
    assert decode.start_ns <= transfer.start_ns <= transfer.end_ns <= decode.end_ns
    assert not any(span.is_error for span in spans)


def check_second_turn(spans: list[CollectedSpan]) -> None:
    assert sorted(span.name for span in spans) == ["decode", "generate", "kv_prefix_pull", "kv_transfer", "prefill"]
    by_name = {span.name: span for span in spans}
    pull = by_name["kv_prefix_pull"]
    assert pull.parent_id == by_name["prefill"].span_id
    assert pull.attributes["kvrelay.blocks_pulled"] == 128 // 16
