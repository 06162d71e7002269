"""Switches OpenTelemetry's traces and metrics on, for one process, by OpenTelemetry's own environment variables.

OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER are `otlp` (the endpoint, the export interval and the like are the SDK's
own variables; the library comes with `kvrelay[otlp]`), `console` (on stderr) or `none`, which is the default. What is
recorded is up to `tracing` and to who makes instruments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace

from kvrelay_core.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter

TRACES_VARIABLE = "OTEL_TRACES_EXPORTER"
METRICS_VARIABLE = "OTEL_METRICS_EXPORTER"


def start_telemetry(service: str, instance: str) -> Callable[[], None]:
    """Once in a process, before its first span and instrument; what it returns sends what is left, and stops.

    `service` is the role, `instance` this process among its likes. Raises ConfigError for an exporter that is unknown
    or not installed.
    """
    traces, readings = _choice(TRACES_VARIABLE), _choice(METRICS_VARIABLE)
    stops: list[Callable[[], None]] = []
    if traces is not None:
        stops.append(_start_traces(_span_exporter(traces), _resource(service, instance)))
    if readings is not None:
        stops.append(_start_metrics(_metric_exporter(readings), _resource(service, instance)))

    def stop() -> None:
        for stop_one in stops:
            stop_one()

    return stop


def _choice(variable: str) -> str | None:
    name = os.environ.get(variable, "") or "none"
    if name not in ("otlp", "console", "none"):
        raise ConfigError(f"{variable} must be otlp, console or none, not {name!r}")
    return None if name == "none" else name


def _resource(service: str, instance: str) -> Resource:
    from opentelemetry.sdk.resources import Resource

    return Resource.create({"service.name": f"kvrelay-{service}", "service.instance.id": instance})


def _start_traces(exporter: SpanExporter, resource: Resource) -> Callable[[], None]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _start_metrics(exporter: MetricExporter, resource: Resource) -> Callable[[], None]:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    provider = MeterProvider([PeriodicExportingMetricReader(exporter)], resource=resource)
    metrics.set_meter_provider(provider)
    return provider.shutdown


def _span_exporter(name: str) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise _missing(TRACES_VARIABLE) from error
    return OTLPSpanExporter()


def _metric_exporter(name: str) -> MetricExporter:
    if name == "console":
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

        return ConsoleMetricExporter(out=sys.stderr)
    try:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    except ImportError as error:
        raise _missing(METRICS_VARIABLE) from error
    return OTLPMetricExporter()


def _missing(variable: str) -> ConfigError:
    return ConfigError(f"{variable}=otlp needs a library: pip install 'kvrelay[otlp]'")
