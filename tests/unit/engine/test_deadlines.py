"""Deadlines of requests that ended are forgotten, those of the others are kept."""

from __future__ import annotations

from handoff_sides import make_sequence

from kvrelay_engine.deadlines import Deadlines
from kvrelay_engine.sequence import EngineRequest


def request_until(request_id: int, at_s: float | None) -> EngineRequest:
    request = make_sequence([1, 2], request_id).request
    request.deadline_at_s = at_s
    return request


def test_each_is_due_once_and_in_order() -> None:
    requests = {index: request_until(index, 10.0 - index) for index in range(4)}
    deadlines = Deadlines(requests)
    for request in requests.values():
        deadlines.add(request)
    assert deadlines.pop_due(6.0) == []
    assert [request.id for request in deadlines.pop_due(8.0)] == [3, 2]
    assert [request.id for request in deadlines.pop_due(99.0)] == [1, 0]


def test_those_that_ended_are_not_due_and_do_not_pile_up() -> None:
    requests: dict[int, EngineRequest] = {}
    deadlines = Deadlines(requests)
    kept = requests[0] = request_until(0, 3600.0)
    deadlines.add(kept)
    for request_id in range(1, 1000):
        requests[request_id] = request_until(request_id, 3000.0)
        deadlines.add(requests[request_id])
        del requests[request_id]
    assert len(deadlines) < 100
    assert deadlines.pop_due(4000.0) == [kept]
