"""When what happened to one request, as its client gets to see it. Fed by the run; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrelay.v1.inference_pb2 import RequestTiming
from kvrelay_core.clock import Clock
from kvrelay_core.request import HandoffTiming
from kvrelay_core.rpc.wire import handoff_timing_to_wire


@dataclass(slots=True)
class _Arrivals:
    """Of the tokens of one choice."""

    first_s: float
    last_s: float
    num_tokens: int
    longest_gap_s: float = 0.0


@dataclass(slots=True)
class RequestTimer:
    clock: Clock
    started_s: float
    queue_s: float = 0.0
    cached_tokens: int = 0
    handoff: HandoffTiming | None = None
    prefill_worker: str = ""
    decode_worker: str = ""
    _first_token_s: float | None = None
    _arrivals: dict[int, _Arrivals] = field(default_factory=dict)

    def note_tokens(self, choice: int, num_tokens: int) -> None:
        now_s = self.clock.now()
        if self._first_token_s is None:
            self._first_token_s = now_s
        arrivals = self._arrivals.get(choice)
        if arrivals is None:
            self._arrivals[choice] = _Arrivals(now_s, now_s, num_tokens)
            return
        arrivals.longest_gap_s = max(arrivals.longest_gap_s, now_s - arrivals.last_s)
        arrivals.last_s = now_s
        arrivals.num_tokens += num_tokens

    def timing(self, choice: int, attempts: int) -> RequestTiming:
        """As it stands now: asked for when the choice finishes."""
        arrivals = self._arrivals.get(choice)
        mean_s = longest_s = 0.0
        if arrivals is not None and arrivals.num_tokens > 1:
            mean_s = (arrivals.last_s - arrivals.first_s) / (arrivals.num_tokens - 1)
            longest_s = arrivals.longest_gap_s
        first_s = self._first_token_s
        return RequestTiming(
            queue_s=self.queue_s,
            ttft_s=0.0 if first_s is None else first_s - self.started_s,
            total_s=self.clock.now() - self.started_s,
            inter_token_mean_s=mean_s,
            inter_token_max_s=longest_s,
            handoff=None if self.handoff is None else handoff_timing_to_wire(self.handoff),
            attempts=attempts,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
        )
