"""How long to wait before a dead role is started again: 0.5 s, doubling to 10 s, anew after a good run."""

from __future__ import annotations

FIRST_S = 0.5
LONGEST_S = 10.0
# A role that served this long before it died starts the series anew.
GOOD_RUN_S = 30.0


class Backoff:
    def __init__(self) -> None:
        self._next_s = FIRST_S

    def after_run(self, served_s: float) -> float:
        """The wait after a run that served for `served_s` (0: it never did)."""
        if served_s >= GOOD_RUN_S:
            self._next_s = FIRST_S
        delay_s = self._next_s
        self._next_s = min(LONGEST_S, delay_s * 2)
        return delay_s
