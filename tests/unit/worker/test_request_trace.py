"""Spans of one request at a worker, and what switches them on."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvrelay_core.errors import ConfigError
from kvrelay_core.request import AttemptId, HandoffTiming
from kvrelay_core.telemetry import start_telemetry
from kvrelay_core.tracing import start_span, trace_parent_of
from kvrelay_worker.request_trace import KV_TRANSFER, RequestTrace

ATTEMPT = AttemptId("router", "request", 2)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    return exporter


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_and_what_it_waited_for(exported: InMemorySpanExporter) -> None:
    parent = start_span("generate")
    request = RequestTrace("decode", ATTEMPT, trace_parent_of(parent))
    request.begin(KV_TRANSFER)
    request.finish(KV_TRANSFER, HandoffTiming(2_000_000_000, 0.5, 7, 1, "shm"))
    request.note(cached_tokens=5)
    request.end()
    request.end("TooLateError")
    request.begin(KV_TRANSFER)
    found = spans(exported)
    assert len(exported.get_finished_spans()) == 2
    decode, transfer = found["decode"], found[KV_TRANSFER]
    assert decode.parent is not None and decode.parent.span_id == parent.get_span_context().span_id
    assert transfer.parent is not None and transfer.parent.span_id == decode.context.span_id
    assert transfer.attributes == {
        "kvrelay.connector": "shm", "kvrelay.size_bytes": 2_000_000_000, "kvrelay.reading_s": 0.5,
        "kvrelay.gb_per_s": 4.0, "kvrelay.blocks_pulled": 7, "kvrelay.blocks_reused": 1,
    }  # fmt: skip
    assert decode.attributes is not None and decode.attributes["kvrelay.cached_tokens"] == 5
    assert decode.status.is_ok or decode.status.is_unset


def test_an_end_with_an_error_ends_what_is_still_open(exported: InMemorySpanExporter) -> None:
    request = RequestTrace("decode", ATTEMPT, "")
    request.begin(KV_TRANSFER)
    request.end("WorkerLostError")
    found = spans(exported)
    assert [found[name].status.description for name in ("decode", KV_TRANSFER)] == ["WorkerLostError"] * 2
    assert not found["decode"].status.is_ok


def test_nothing_is_recorded_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    monkeypatch.delenv("OTEL_METRICS_EXPORTER", raising=False)
    start_telemetry("prefill", "prefill-0")()
    span = start_span("prefill")
    assert not span.is_recording() and trace_parent_of(span) == ""


@pytest.mark.parametrize("variable", ["OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER"])
def test_an_unknown_exporter_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "zipkin")
    with pytest.raises(ConfigError, match="otlp, console or none"):
        start_telemetry("prefill", "prefill-0")
