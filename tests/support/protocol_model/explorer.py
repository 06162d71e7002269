"""Breadth-first search over every interleaving of a model's steps, to a shortest trace to a violation.

Knows nothing of the protocol: a model is anything that has an initial state, steps, and opinions on states.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

State = TypeVar("State", bound=Hashable)
Item = TypeVar("Item")

STUCK = "STUCK"


class Model(Protocol[State]):
    def initial(self) -> State: ...

    def steps(self, state: State) -> Iterable[tuple[str, State]]:
        """Every step enabled in `state`, with a name for traces."""
        ...

    def violation(self, state: State) -> str | None:
        """`KIND: detail` when `state` must never be reached."""
        ...

    def is_finished(self, state: State) -> bool:
        """Whether nothing is left to do; a state without steps that is not finished is STUCK."""
        ...


@dataclass(frozen=True)
class Violation:
    kind: str
    detail: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}\n    " + " > ".join(self.trace)


@dataclass(frozen=True)
class Exploration:
    """`is_complete`: every reachable state was visited, not only as many as the bound allowed."""

    num_states: int
    is_complete: bool
    violation: Violation | None


def explore(model: Model[State], max_states: int = 1_000_000, *, must_progress: bool = False) -> Exploration:
    """Visits states in order of distance, so a violation's trace is a shortest one.

    `must_progress` asks as well that from every state a finished one can be reached: no way into endless turns.
    """
    start = model.initial()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    leads_to: dict[State, list[State]] = {}
    frontier = deque([start])
    while frontier:
        state = frontier.popleft()
        successors = list(model.steps(state))
        fault = model.violation(state)
        if fault is None and not successors and not model.is_finished(state):
            fault = f"{STUCK}: no step is enabled and work is left"
        if fault is not None:
            kind, _, detail = fault.partition(": ")
            return Exploration(len(came_from), False, Violation(kind, detail, _trace_to(state, came_from)))
        if must_progress:
            leads_to[state] = [successor for _, successor in successors]
        for name, successor in successors:
            if successor not in came_from:
                came_from[successor] = (state, name)
                frontier.append(successor)
        if len(came_from) > max_states:
            return Exploration(len(came_from), False, None)
    trap = _find_trap(model, leads_to)
    if trap is not None:
        fault_trace = _trace_to(trap, came_from)
        return Exploration(len(came_from), True, Violation(STUCK, "no way on leads to an end", fault_trace))
    return Exploration(len(came_from), True, None)


def _find_trap(model: Model[State], leads_to: dict[State, list[State]]) -> State | None:
    """The first state in `leads_to` from which no finished state can be reached."""
    comes_from: dict[State, list[State]] = {state: [] for state in leads_to}
    for state, successors in leads_to.items():
        for successor in successors:
            comes_from[successor].append(state)
    frontier = deque(state for state in leads_to if model.is_finished(state))
    good = set(frontier)
    while frontier:
        for state in comes_from[frontier.popleft()]:
            if state not in good:
                good.add(state)
                frontier.append(state)
    return next((state for state in leads_to if state not in good), None)


def _trace_to(state: State, came_from: dict[State, tuple[State, str] | None]) -> tuple[str, ...]:
    names: list[str] = []
    step = came_from[state]
    while step is not None:
        state, name = step
        names.append(name)
        step = came_from[state]
    return tuple(reversed(names))


def replaced(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    """The tuple with `item` at `index`."""
    return (*items[:index], item, *items[index + 1 :])
