"""Finds stop strings in a growing text, whatever the pieces it comes in.

Text that may be the beginning of a stop string is held back until it is decided. The string that is complete
first wins; of several that end together, the longest. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """`matched` is the stop string found, after which nothing comes out any more."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes the next piece; returns what can no longer be part of a stop string, the stop string excluded."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = self._find()
        if found is not None:
            start, self.matched = found
            released, self._held = self._held[:start], ""
            return released
        keep = self._undecided()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def flush(self) -> str:
        """The text has ended: what was held back is not a stop string."""
        released, self._held = self._held, ""
        return released

    def _find(self) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        best_end = len(self._held) + 1
        for stop in self._stops:  # longest first, so a tie of ends goes to the longest
            start = self._held.find(stop, 0, best_end)
            if start >= 0 and start + len(stop) < best_end:
                best, best_end = (start, stop), start + len(stop)
        return best

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins some stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0
