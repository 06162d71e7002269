"""A worker's load, as whoever collects metrics sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from kvrelay_engine.load_messages import TierLoad
from kvrelay_engine.messages import Load
from kvrelay_worker.worker import Worker
from kvrelay_worker.worker_metrics import COUNTERS, GAUGES, TIER_COUNTERS, TIER_GAUGES, observe


def collect(reader: InMemoryMetricReader) -> dict[str, tuple[float, dict[str, Any]]]:
    data = reader.get_metrics_data()
    assert data is not None
    return {
        metric.name: (point.value, dict(point.attributes or {}))
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
        if hasattr(point, "value")
    }


def test_every_count_of_the_latest_beat_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", lambda name: provider.get_meter(name))
    engine = SimpleNamespace(load=Load())
    worker = SimpleNamespace(config=SimpleNamespace(role="decode"), engine=engine)
    observe(cast(Worker, worker))
    tier = TierLoad(tier="redis", hits=7, is_left_alone=True)
    engine.load = Load(blocks_total=100, blocks_pinned=25, handoff_bytes=1 << 30, stale_reads=3, tiers=(tier,))
    found = collect(reader)
    assert found.keys() == {reading.name for reading in (*GAUGES, *COUNTERS, *TIER_GAUGES, *TIER_COUNTERS)}
    assert found["kvrelay.kv.pinned_share"] == (0.25, {"kvrelay.role": "decode"})
    assert found["kvrelay.kv.handoff.size"][0] == 1 << 30 and found["kvrelay.kv.stale_reads"][0] == 3
    assert found["kvrelay.tier.hits"] == (7, {"kvrelay.role": "decode", "kvrelay.tier": "redis"})
    assert found["kvrelay.tier.left_alone"][0] == 1
    provider.shutdown()
