"""Which workers a request goes to. Policies see candidates and loads as numbers, never sessions or streams.

A policy is any object with `place`; it decides synchronously and may keep state of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay_core.errors import ConfigError, UnavailableError


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy may know of a request, or of the rest of one that is placed anew."""

    prompt: tuple[int, ...]
    num_committed: int
    max_new_tokens: int
    cache_salt: str = ""
    session_id: str = ""
    priority: int = 0

    @property
    def num_input_tokens(self) -> int:
        return len(self.prompt) + self.num_committed

    @property
    def num_total_tokens(self) -> int:
        return self.num_input_tokens + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that serves, with the tokens that this router has outstanding there."""

    key: str
    outstanding_tokens: int


@dataclass(frozen=True, slots=True)
class Candidates:
    prefill: Sequence[Candidate]
    decode: Sequence[Candidate]


@dataclass(frozen=True, slots=True)
class Decision:
    prefill: str
    decode: str


class Placement(Protocol):
    def place(self, request: RequestView, candidates: Candidates) -> Decision:
        """Both lists have at least one candidate."""
        ...


class RoundRobin:
    """Each role in turn, by key, whatever the load."""

    def __init__(self) -> None:
        self._last_prefill = self._last_decode = ""

    def place(self, request: RequestView, candidates: Candidates) -> Decision:
        self._last_prefill = _next_after(self._last_prefill, candidates.prefill)
        self._last_decode = _next_after(self._last_decode, candidates.decode)
        return Decision(self._last_prefill, self._last_decode)


class LeastLoad:
    """The fewest outstanding tokens; of equals, the one in turn, so that a cold cluster is not all on one worker."""

    def __init__(self) -> None:
        self._last_prefill = self._last_decode = ""

    def place(self, request: RequestView, candidates: Candidates) -> Decision:
        self._last_prefill = _next_after(self._last_prefill, _least_loaded(candidates.prefill))
        self._last_decode = _next_after(self._last_decode, _least_loaded(candidates.decode))
        return Decision(self._last_prefill, self._last_decode)


def make_placement(name: str) -> Placement:
    """Raises ConfigError for an unknown name."""
    policies: dict[str, type[RoundRobin] | type[LeastLoad]] = {"round_robin": RoundRobin, "least_load": LeastLoad}
    if name not in policies:
        raise ConfigError(f"placement must be one of {', '.join(policies)}, not {name!r}", field="placement")
    return policies[name]()


def eligible(
    role: str, workers: Sequence[Candidate], excluded: frozenset[str], avoided: frozenset[str]
) -> list[Candidate]:
    """The candidates that did not refuse the request, those that lost it only when there is no other.

    Raises UnavailableError when none is left.
    """
    willing = [worker for worker in workers if worker.key not in excluded]
    if not willing:
        tried = f"; {len(workers)} refused this request" if workers else ""
        raise UnavailableError(f"no {role} worker can take the request{tried}; try again later", role=role)
    return [worker for worker in willing if worker.key not in avoided] or willing


class LoadAccount:
    """Tokens that this router has outstanding at each worker, by its own account."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def charge(self, worker: str, num_tokens: int) -> None:
        self._tokens[worker] = self._tokens.get(worker, 0) + num_tokens

    def discharge(self, worker: str, num_tokens: int) -> None:
        left = self._tokens[worker] - num_tokens
        assert left >= 0, "discharged more than was charged"
        if left:
            self._tokens[worker] = left
        else:
            del self._tokens[worker]

    def outstanding(self, worker: str) -> int:
        return self._tokens.get(worker, 0)

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
