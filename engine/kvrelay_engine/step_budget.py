"""How many tokens a step may have, so that it ends in time for a beat (PROTOCOL B3).

Beats go out between steps. A step that takes seconds loses the leases of this engine's hand-offs, and one that
takes longer still its service's trust. So the first step is small; as long as full steps take less than half of the
target the next may be twice as large, and one that took too long cuts the next in proportion. Decoding sequences
get their token of every step in any case. Knows numbers and seconds only.
"""

from __future__ import annotations

FIRST_STEP_TOKENS = 64
LEAST_PROMPT_TOKENS = 8  # of a step, so that prompts go on however slow the device is


class StepBudget:
    def __init__(self, max_tokens: int, target_s: float) -> None:
        self._max_tokens = max_tokens
        self._target_s = target_s
        self._tokens = min(FIRST_STEP_TOKENS, max_tokens)

    def for_decodes(self, num_decodes: int) -> int:
        """Tokens of the next step, in which `num_decodes` sequences need one each."""
        return min(self._max_tokens, max(self._tokens, num_decodes + LEAST_PROMPT_TOKENS))

    def record(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if seconds > self._target_s:
            self._tokens = max(1, min(self._tokens, int(num_tokens * self._target_s / seconds)))
        elif 2 * seconds <= self._target_s and 2 * num_tokens >= self._tokens:
            self._tokens = min(self._max_tokens, 2 * self._tokens)
