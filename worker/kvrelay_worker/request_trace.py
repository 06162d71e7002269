"""The spans of one request at a worker: one for its stay here, and children for what it waited for."""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.trace import Span

from kvrelay_core.request import AttemptId, HandoffTiming
from kvrelay_core.tracing import Attribute, end_span, start_span, trace_parent_of

KV_TRANSFER = "kv_transfer"
PREFIX_PULL = "kv_prefix_pull"


class RequestTrace:
    """Whatever is ended twice was ended the first time."""

    def __init__(self, name: str, attempt: AttemptId, trace_parent: str) -> None:
        self._span = start_span(name, trace_parent, is_entry=True)
        self._children: dict[str, Span] = {}
        self._is_over = False
        self.note(request_id=attempt.request_id, attempt=attempt.attempt)

    def note(self, **attributes: Attribute) -> None:
        """`cached_tokens=5` is the attribute `kvrelay.cached_tokens`."""
        for name, value in attributes.items():
            self._span.set_attribute(f"kvrelay.{name}", value)

    def begin(self, name: str) -> None:
        if not self._is_over:
            self._children[name] = start_span(name, trace_parent_of(self._span))

    def finish(self, name: str, timing: HandoffTiming | None = None, error: str = "") -> None:
        """Ends a child; `timing` is what was moved in it."""
        child = self._children.pop(name, None)
        if child is None:
            return
        if timing is not None:
            for attribute, value in _transfer_attributes(timing).items():
                child.set_attribute(f"kvrelay.{attribute}", value)
        end_span(child, error)

    def end(self, error: str = "") -> None:
        if self._is_over:
            return
        self._is_over = True
        for name in list(self._children):
            self.finish(name, error=error)
        end_span(self._span, error)


TraceOf = Callable[[int], RequestTrace | None]  # by the request's id at this worker


def _transfer_attributes(timing: HandoffTiming) -> dict[str, Attribute]:
    gb_per_s = timing.size_bytes / timing.seconds / 1e9 if timing.seconds > 0 else 0.0
    return {
        "connector": timing.connector,
        "size_bytes": timing.size_bytes,
        "reading_s": timing.seconds,
        "gb_per_s": gb_per_s,
        "blocks_pulled": timing.blocks_pulled,
        "blocks_reused": timing.blocks_reused,
    }
