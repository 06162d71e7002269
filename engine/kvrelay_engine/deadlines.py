"""When requests have to be over: a heap, in which entries of requests that ended are skipped and, at times, dropped."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from kvrelay_engine.sequence import EngineRequest

_MAX_STALE = 64  # entries of ended requests, beside as many as there are requests


class Deadlines:
    def __init__(self, requests: Mapping[int, EngineRequest]) -> None:
        """`requests` are those in progress, by id; kept by the engine."""
        self._requests = requests
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: EngineRequest) -> None:
        if request.deadline_at_s is None:
            return
        if len(self._heap) > 2 * len(self._requests) + _MAX_STALE:
            self._heap = [entry for entry in self._heap if self._is_current(*entry)]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (request.deadline_at_s, request.id))

    def pop_due(self, now_s: float) -> list[EngineRequest]:
        """The requests whose deadline has passed; each is named once."""
        due: list[EngineRequest] = []
        while self._heap and self._heap[0][0] <= now_s:
            at_s, request_id = heapq.heappop(self._heap)
            if self._is_current(at_s, request_id):
                due.append(self._requests[request_id])
        return due

    def _is_current(self, at_s: float, request_id: int) -> bool:
        request = self._requests.get(request_id)
        return request is not None and request.deadline_at_s == at_s
