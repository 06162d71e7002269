"""What one step has for the service: its tokens as columns of one message, then the choices that ended."""

from __future__ import annotations

from collections.abc import Callable

from kvrelay_core.request import TokenLogprobs
from kvrelay_engine.messages import ChoiceFinished, Event, StepTokens
from kvrelay_engine.sequence import Sequence


class StepOutput:
    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._rows: list[tuple[int, int, int, int]] = []  # request, choice, position, token
        self._logprobs: list[TokenLogprobs | None] = []
        self._finished: list[ChoiceFinished] = []

    def add_token(self, sequence: Sequence, position: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        self._rows.append((sequence.request.id, sequence.choice, position, token_id))
        self._logprobs.append(logprobs)

    def add_finished(self, finished: ChoiceFinished) -> None:
        self._finished.append(finished)

    def flush(self) -> None:
        """Call once a step, and before any message that ends a request."""
        if self._rows:
            has_logprobs = any(logprobs is not None for logprobs in self._logprobs)
            ids, choices, positions, token_ids = zip(*self._rows, strict=True)
            self._emit(StepTokens(ids, choices, positions, token_ids, tuple(self._logprobs) if has_logprobs else ()))
            self._rows, self._logprobs = [], []
        for finished in self._finished:
            self._emit(finished)
        self._finished = []
