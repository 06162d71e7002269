"""How fast this engine computes prompts, measured: the base of every estimate of a wait."""

from __future__ import annotations

_WEIGHT_OF_NEWEST = 0.2


class Throughput:
    """A moving average of computed tokens per second, over the steps that computed prompt tokens."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None

    def record(self, num_tokens: int, seconds: float) -> None:
        newest = seconds / num_tokens
        if self._seconds_per_token is None:
            self._seconds_per_token = newest
        else:
            self._seconds_per_token += _WEIGHT_OF_NEWEST * (newest - self._seconds_per_token)

    def seconds_for(self, num_tokens: int) -> float:
        """0 while nothing has been measured."""
        return num_tokens * (self._seconds_per_token or 0.0)
