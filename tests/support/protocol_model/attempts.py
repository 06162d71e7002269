"""Model of PROTOCOL C4: what a worker makes of opens and cancels that arrive late, twice or in the wrong order.

The router's messages for one request may travel over different streams (a session and the one that replaced
it), so nothing keeps their order. The router wants its highest attempt that it did not cancel to run, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from protocol_model.explorer import replaced

ZOMBIE = "ZOMBIE"
TWO_AT_ONCE = "TWO AT ONCE"
STARTED_TWICE = "STARTED TWICE"
NOT_RUNNING = "NOT RUNNING"


@dataclass(frozen=True)
class AttemptRules:
    keep_tombstones: bool = True  # a cancel that overtakes its request is remembered
    cancel_names_its_attempt: bool = True  # a late cancel does not hit a later attempt
    same_reattaches: bool = True  # an attempt that is known is not started again
    higher_supersedes: bool = True  # a higher attempt ends a lower one
    refuse_lower: bool = True  # a lower attempt than one that is known is refused (ALREADY_EXISTS)


class Message(NamedTuple):
    kind: str  # "open" or "cancel"
    attempt: int


class AttemptState(NamedTuple):
    on_the_way: tuple[Message, ...]
    running: frozenset[int] = frozenset()
    cancelled: frozenset[int] = frozenset()  # tombstones
    starts: tuple[int, int] = (0, 0)  # of attempts 1 and 2

    @property
    def highest_known(self) -> int:
        return 2 if self.starts[1] else min(self.starts[0], 1)


class AttemptModel:
    def __init__(self, sent: tuple[Message, ...], rules: AttemptRules) -> None:
        """`sent` is what the router sends altogether; every order of arrival is tried."""
        self._sent = sent
        self._rules = rules
        cancelled = {m.attempt for m in sent if m.kind == "cancel"}
        highest = max(m.attempt for m in sent if m.kind == "open")
        self._wanted = frozenset({highest} - cancelled)

    def initial(self) -> AttemptState:
        return AttemptState(self._sent)

    def steps(self, state: AttemptState) -> Iterator[tuple[str, AttemptState]]:
        for index, message in enumerate(state.on_the_way):
            rest = state._replace(on_the_way=state.on_the_way[:index] + state.on_the_way[index + 1 :])
            after = self._opened(rest, message) if message.kind == "open" else self._cancelled(rest, message)
            yield f"{message.kind}({message.attempt}) arrives", after

    def violation(self, state: AttemptState) -> str | None:
        if len(state.running) > 1:
            return f"{TWO_AT_ONCE}: attempts {sorted(state.running)} run for one request"
        if max(state.starts) > 1:
            return f"{STARTED_TWICE}: an attempt was computed twice"
        if state.on_the_way:
            return None
        if state.running - self._wanted:
            return f"{ZOMBIE}: attempts {sorted(state.running - self._wanted)} run and nobody wants them"
        if self._wanted - state.running:
            return f"{NOT_RUNNING}: attempt {max(self._wanted)} is wanted and does not run"
        return None

    def is_finished(self, state: AttemptState) -> bool:
        return not state.on_the_way

    # ------------------------------------------------------------------------------------------- worker

    def _opened(self, state: AttemptState, message: Message) -> AttemptState:
        attempt = message.attempt
        if attempt in state.cancelled:
            return state
        if self._rules.same_reattaches and state.starts[attempt - 1]:
            return state
        if self._rules.refuse_lower and attempt < state.highest_known:
            return state
        superseded = {a for a in state.running if a < attempt} if self._rules.higher_supersedes else set()
        starts = replaced(state.starts, attempt - 1, state.starts[attempt - 1] + 1)
        return state._replace(running=(state.running - superseded) | {attempt}, starts=(starts[0], starts[1]))

    def _cancelled(self, state: AttemptState, message: Message) -> AttemptState:
        hit = {message.attempt} if self._rules.cancel_names_its_attempt else set(state.running)
        is_early = not state.starts[message.attempt - 1]
        if is_early and self._rules.keep_tombstones:
            state = state._replace(cancelled=state.cancelled | {message.attempt})
        return state._replace(running=state.running - hit)
