"""How long a step may be held up for KV that is about to be whole.

What arrives while a step runs joins the next one, most of a step late for want of a fraction of one. So the step waits
where that is soon over, as long as all such waits together stay a small share of the time.
"""

from __future__ import annotations

from kvrelay_core.clock import Clock

SHARE = 0.03  # of the time
MAX_WAIT_S = 0.002


class ArrivalWait:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._credit_s = MAX_WAIT_S
        self._at_s = clock.now()

    def allowed_s(self) -> float:
        """Now."""
        now_s = self._clock.now()
        self._credit_s = min(MAX_WAIT_S, self._credit_s + SHARE * (now_s - self._at_s))
        self._at_s = now_s
        return max(0.0, self._credit_s)

    def spend(self, seconds: float) -> None:
        self._credit_s -= seconds
