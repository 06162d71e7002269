"""Which workers a request goes to. Policies see candidates and loads as numbers, never sessions or streams.

A policy is any object with `place`; it decides synchronously and may keep state of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay_core.errors import ConfigError
from kvrelay_core.request import NO_SLO, Slo


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy may know of a request, or of the rest of one that is placed anew."""

    prompt: tuple[int, ...]
    num_committed: int
    max_new_tokens: int
    cache_salt: str = ""
    session_id: str = ""
    priority: int = 0
    slo: Slo = NO_SLO  # what is left of it

    @property
    def num_input_tokens(self) -> int:
        return len(self.prompt) + self.num_committed

    @property
    def num_total_tokens(self) -> int:
        return self.num_input_tokens + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that serves, with the tokens that are outstanding there."""

    key: str
    outstanding_tokens: int


@dataclass(frozen=True, slots=True)
class Candidates:
    prefill: Sequence[Candidate]  # empty: the cluster has none
    decode: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class Decision:
    prefill: str | None  # None: decode computes the prompt too, and nothing is handed off
    decode: str


class Placement(Protocol):
    def place(self, request: RequestView, candidates: Candidates) -> Decision:
        """There is at least one decode candidate."""
        ...


class RoundRobin:
    """Each role in turn, by key, whatever the load."""

    def __init__(self) -> None:
        self._last_prefill = self._last_decode = ""

    def place(self, request: RequestView, candidates: Candidates) -> Decision:
        if candidates.prefill:
            self._last_prefill = _next_after(self._last_prefill, candidates.prefill)
        self._last_decode = _next_after(self._last_decode, candidates.decode)
        return Decision(self._last_prefill if candidates.prefill else None, self._last_decode)


class LeastLoad:
    """The fewest outstanding tokens; of equals, the one in turn, so that a cold cluster is not all on one worker."""

    def __init__(self) -> None:
        self._last_prefill = self._last_decode = ""

    def place(self, request: RequestView, candidates: Candidates) -> Decision:
        if candidates.prefill:
            self._last_prefill = _next_after(self._last_prefill, _least_loaded(candidates.prefill))
        self._last_decode = _next_after(self._last_decode, _least_loaded(candidates.decode))
        return Decision(self._last_prefill if candidates.prefill else None, self._last_decode)


def make_placement(name: str) -> Placement:
    """Raises ConfigError for an unknown name."""
    policies: dict[str, type[RoundRobin] | type[LeastLoad]] = {"round_robin": RoundRobin, "least_load": LeastLoad}
    if name not in policies:
        raise ConfigError(f"placement must be one of {', '.join(policies)}, not {name!r}", field="placement")
    return policies[name]()


def eligible(workers: Sequence[Candidate], excluded: frozenset[str], avoided: frozenset[str]) -> list[Candidate]:
    """The candidates that did not refuse the request, those that lost it only when there is no other."""
    willing = [worker for worker in workers if worker.key not in excluded]
    return [worker for worker in willing if worker.key not in avoided] or willing


class LoadAccount:
    """Tokens that are outstanding at each worker: by this router's own account, which is never late, and by what the
    worker's reports show beyond it, which is the work of other routers."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._others: dict[str, int] = {}

    def charge(self, worker: str, num_tokens: int) -> None:
        self._tokens[worker] = self._tokens.get(worker, 0) + num_tokens

    def discharge(self, worker: str, num_tokens: int) -> None:
        left = self._tokens[worker] - num_tokens
        assert left >= 0, "discharged more than was charged"
        if left:
            self._tokens[worker] = left
        else:
            del self._tokens[worker]

    def note_report(self, worker: str, num_tokens: int) -> None:
        self._others[worker] = max(0, num_tokens - self.outstanding(worker))

    def outstanding(self, worker: str) -> int:
        """By the own account alone."""
        return self._tokens.get(worker, 0)

    def load_of(self, worker: str) -> int:
        return self.outstanding(worker) + self._others.get(worker, 0)

    @property
    def total(self) -> int:
        return sum(self._tokens.values())


def _next_after(last: str, candidates: Sequence[Candidate]) -> str:
    """The next key after `last` in cyclic order. It needs no index, so workers may come and go."""
    keys = sorted(candidate.key for candidate in candidates)
    return next((key for key in keys if key > last), keys[0])


def _least_loaded(candidates: Sequence[Candidate]) -> list[Candidate]:
    least = min(candidate.outstanding_tokens for candidate in candidates)
    return [candidate for candidate in candidates if candidate.outstanding_tokens == least]
