"""Which attempt of which request this worker serves (PROTOCOL C4).

The same attempt comes back to its record; a higher one supersedes; a lower or ended one is refused; a cancel
that arrives before its request leaves a tombstone. Pure bookkeeping: knows nothing of streams or the engine.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvrelay_core.clock import Clock
from kvrelay_core.errors import RequestCancelledError, SupersededError
from kvrelay_core.request import AttemptId

R = TypeVar("R")

MEMORY_S = 60.0


@dataclass(slots=True)
class _Entry(Generic[R]):
    attempt: int  # the highest one known
    record: R | None = None  # of that attempt, while it lives
    cancelled: bool = False
    refused: bool = False  # it never began here, and may be offered again
    forget_at_s: float = 0.0  # once it has no record


class AttemptTable(Generic[R]):
    def __init__(self, clock: Clock, memory_s: float = MEMORY_S) -> None:
        self._clock = clock
        self._memory_s = memory_s
        self._entries: dict[tuple[str, str], _Entry[R]] = {}
        self._endings: deque[tuple[float, tuple[str, str]]] = deque()  # ascending by time

    def find(self, attempt: AttemptId) -> R | None:
        """The record of this very attempt, to re-attach to; None when the attempt is new, or was refused.

        Raises SupersededError for a lower or ended attempt, RequestCancelledError for a cancelled one.
        """
        self._forget()
        entry = self._entries.get(attempt.request_key)
        if entry is None or attempt.attempt > entry.attempt:
            return None
        if attempt.attempt < entry.attempt:
            raise SupersededError(
                f"attempt {attempt.attempt} of {attempt.request_id} is superseded by attempt {entry.attempt}"
            )
        if entry.record is not None:
            return entry.record
        if entry.refused:
            return None
        if entry.cancelled:
            raise RequestCancelledError(f"attempt {attempt.attempt} of {attempt.request_id} was cancelled")
        raise SupersededError(f"attempt {attempt.attempt} of {attempt.request_id} has ended here; use a higher one")

    def begin(self, attempt: AttemptId, record: R) -> R | None:
        """Registers an attempt that `find` did not know. Returns the record that it supersedes, if any."""
        entry = self._entries.get(attempt.request_key)
        assert entry is None or attempt.attempt > entry.attempt or entry.refused, "begin() without find()"
        self._entries[attempt.request_key] = _Entry(attempt.attempt, record)
        return None if entry is None else entry.record

    def promote(self, old: AttemptId, new: AttemptId) -> None:
        """The record of attempt `old` goes on as attempt `new` of the same request.

        Raises SupersededError when `old` does not live here or `new` is not above it.
        """
        entry = self._entries.get(old.request_key)
        if entry is None or entry.record is None or entry.attempt != old.attempt:
            raise SupersededError(f"attempt {old.attempt} of {old.request_id} does not run here any more")
        if new.request_key != old.request_key or new.attempt <= old.attempt:
            raise SupersededError(f"attempt {new.attempt} is not above attempt {old.attempt} of {old.request_id}")
        entry.attempt = new.attempt

    def cancel(self, attempt: AttemptId) -> R | None:
        """Returns the record to be aborted: of this attempt or of a lower one. Whatever is not known yet, up to
        this attempt, is refused from now on. Cancelling a superseded attempt has no effect."""
        self._forget()
        entry = self._entries.get(attempt.request_key)
        if entry is not None and entry.attempt > attempt.attempt:
            return None
        record = None if entry is None else entry.record
        self._bury(attempt, cancelled=True)
        return record

    def end(self, attempt: AttemptId) -> None:
        """The attempt is over. Without effect when a higher one has taken its place."""
        entry = self._entries.get(attempt.request_key)
        if entry is not None and entry.attempt == attempt.attempt and entry.record is not None:
            self._bury(attempt, cancelled=False)

    def refuse(self, attempt: AttemptId) -> None:
        """As `end`, but the same attempt may come again: there was no room for it."""
        self.end(attempt)
        entry = self._entries.get(attempt.request_key)
        if entry is not None and entry.attempt == attempt.attempt and entry.record is None:
            entry.refused = not entry.cancelled

    def _bury(self, attempt: AttemptId, *, cancelled: bool) -> None:
        forget_at_s = self._clock.now() + self._memory_s
        self._entries[attempt.request_key] = _Entry(attempt.attempt, None, cancelled, forget_at_s=forget_at_s)
        self._endings.append((forget_at_s, attempt.request_key))

    def _forget(self) -> None:
        now_s = self._clock.now()
        while self._endings and self._endings[0][0] <= now_s:
            _, key = self._endings.popleft()
            entry = self._entries.get(key)
            if entry is not None and entry.record is None and entry.forget_at_s <= now_s:
                del self._entries[key]
