"""Finds workers for one leg, again and again for a while when nobody can take it.

A role of which no worker serves is waited for: a restart takes seconds. A decode worker that has no room is asked
again after a back-off, while the ticket is good; a full prefill worker is not, the client should come back later.
Time is the event loop's; a wait is a timer and a watch of the registry, both gone after `cancel`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from kvrelay_core.errors import KvRelayError, OverloadedError, UnavailableError
from kvrelay_router.fleet import Fleet, NoRoute
from kvrelay_router.itinerary_messages import Place, Route
from kvrelay_router.placement import RequestView

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitTerms:
    absent_s: float  # for a worker of a role of which none serves
    refused_s: float  # for a decode worker to have room again
    encode_s: float = 30.0  # for one encoder's answer


@dataclass(frozen=True, slots=True)
class Outcome:
    """The route, or why there is none."""

    place: Place
    route: Route | None = None
    error: KvRelayError | None = None
    all_refused: bool = False


@dataclass(frozen=True, slots=True)
class _Pending:
    request: RequestView
    place: Place
    done: Callable[[Outcome], None]


class PlacementWait:
    def __init__(self, fleet: Fleet, terms: WaitTerms, tell: Callable[[Callable[[], None]], None]) -> None:
        """`tell` runs what a timer or a change of the registry brings about."""
        self._fleet = fleet
        self._terms = terms
        self._tell = tell
        self._pending: _Pending | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._absent_until_s: float | None = None
        self._refused_until_s: float | None = None
        self._backoff_s = FIRST_BACKOFF_S
        self.ticket_s = float("inf")  # how long the ticket in hand waits for its reader

    def place(self, request: RequestView, place: Place, done: Callable[[Outcome], None]) -> None:
        """Calls `done` once, perhaps at once, unless it is cancelled before."""
        self.cancel()
        self._pending = _Pending(request, place, done)
        self._try(place)

    def accepted(self) -> None:
        """A worker took the request: the next wait is a new one."""
        self._absent_until_s = self._refused_until_s = None
        self._backoff_s = FIRST_BACKOFF_S

    def cancel(self) -> None:
        self._stop_waiting()
        self._pending = None

    # ------------------------------------------------------------------------------------- internal

    def _try(self, place: Place) -> None:
        assert self._pending is not None
        found = self._fleet.place(self._pending.request, place)
        if isinstance(found, Route):
            self._finish(Outcome(place, found))
        elif found.all_refused:
            self._wait_for_room(found)
        else:
            self._wait_for_worker(found)

    def _try_all(self) -> None:
        """Those who refused, too: they have been restarted, or have had time to make room."""
        assert self._pending is not None
        self._try(replace(self._pending.place, excluded=frozenset()))

    def _try_new(self) -> None:
        """A worker has changed. If all that serve have refused, the back-off goes on."""
        assert self._pending is not None
        found = self._fleet.place(self._pending.request, self._pending.place)
        if isinstance(found, Route):
            self._finish(Outcome(self._pending.place, found))

    def _wait_for_worker(self, missing: NoRoute) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._absent_until_s is None:
            self._absent_until_s = now_s + self._terms.absent_s
        message = f"no {missing.role} worker serves, nor did one come within {self._terms.absent_s:g} s"
        error = UnavailableError(f"{message}; try again later", role=missing.role)
        self._wait(self._absent_until_s - now_s, partial(self._fail, error, all_refused=False), self._try_all)

    def _wait_for_room(self, full: NoRoute) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._refused_until_s is None:
            self._refused_until_s = now_s + min(self._terms.refused_s, self.ticket_s)
        left_s = self._refused_until_s - now_s
        if full.role != "decode" or left_s <= 0:
            error = OverloadedError(f"every {full.role} worker refused the request; try again later", role=full.role)
            self._fail(error, all_refused=True)
            return
        self._wait(min(self._backoff_s, left_s), self._try_all, self._try_new)
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    def _wait(self, wait_s: float, on_time: Callable[[], None], on_change: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._tell, on_time)
        self._fleet.registry.watch(self, partial(self._tell, on_change))

    def _stop_waiting(self) -> None:
        self._fleet.registry.unwatch(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fail(self, error: KvRelayError, *, all_refused: bool) -> None:
        assert self._pending is not None
        self._finish(Outcome(self._pending.place, error=error, all_refused=all_refused))

    def _finish(self, outcome: Outcome) -> None:
        assert self._pending is not None
        done = self._pending.done
        self.cancel()
        done(outcome)
