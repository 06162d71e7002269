"""One trace per request, over all processes that it goes through, by OpenTelemetry.

Nothing is recorded unless `telemetry` was told to. Between processes the context travels as a W3C `traceparent`. Span
names and attributes are in docs/operations.md; prompts, tokens and texts are in none of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACE_PARENT = "traceparent"

Attribute = str | int | float
_W3C = TraceContextTextMapPropagator()


def start_span(
    name: str, trace_parent: str = "", *, is_entry: bool = False, attributes: Mapping[str, Attribute] | None = None
) -> Span:
    """A child of the span that `trace_parent` names, or the root of a new trace. The caller ends it.

    `is_entry`: this process was called by another one.
    """
    parent = _W3C.extract({TRACE_PARENT: trace_parent}) if trace_parent else None
    kind = SpanKind.SERVER if is_entry else SpanKind.INTERNAL
    return trace.get_tracer("kvrelay").start_span(name, context=parent, kind=kind, attributes=attributes)


def trace_parent_of(span: Span) -> str:
    """What a child in another process is started with; empty when nothing is traced."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    return carrier.get(TRACE_PARENT, "")


def end_span(span: Span, error: str = "") -> None:
    """`error`: the name of the error class that ended it, if one did."""
    if error:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end()
