"""Decides which token stands at a position, once and for ever (PROTOCOL C1).

Per choice: the first copy of a position wins, tokens behind a gap wait until it is filled, and what comes from a
superseded attempt is dropped. Knows nothing of workers, text or clients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvrelay_core.request import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Token:
    """A token as a worker reports it. Positions count from the first generated token."""

    choice: int
    position: int
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """A worker says that a choice has `num_tokens` tokens in all."""

    choice: int
    reason: FinishReason
    num_tokens: int
    stop_token_id: int | None = None


@dataclass(slots=True)
class _Choice:
    attempt: int = 0
    committed: list[int] = field(default_factory=list)
    waiting: dict[int, Token] = field(default_factory=dict)  # position -> token behind a gap
    ending: Ending | None = None  # announced; takes effect when every token is there
    over: bool = False


class Committer:
    def __init__(self, choices: Iterable[int]) -> None:
        self._choices = {index: _Choice() for index in choices}

    def committed(self, choice: int) -> tuple[int, ...]:
        return tuple(self._choices[choice].committed)

    def next_position(self, choice: int) -> int:
        return len(self._choices[choice].committed)

    def is_over(self, choice: int) -> bool:
        return self._choices[choice].over

    @property
    def num_committed(self) -> int:
        """Of all choices."""
        return sum(len(choice.committed) for choice in self._choices.values())

    def supersede(self, choice: int, attempt: int) -> None:
        """From now on only `attempt` is heard. What it did not commit of lower ones is void: the new attempt may
        sample other tokens at the gap, and what stood behind it would not fit."""
        state = self._choices[choice]
        assert attempt >= state.attempt, "attempts only increase"
        if attempt > state.attempt:
            state.attempt = attempt
            state.waiting.clear()
            state.ending = None

    def offer(self, attempt: int, token: Token) -> list[Token]:
        """Returns the tokens that this one commits, in order: none for a copy, a gap or an old attempt."""
        state = self._choices.get(token.choice)
        if state is None or state.over or attempt != state.attempt or token.position < len(state.committed):
            return []
        if state.ending is not None and token.position >= state.ending.num_tokens:
            return []
        state.waiting.setdefault(token.position, token)
        return self._advance(state)

    def end(self, attempt: int, ending: Ending) -> Ending | None:
        """Announces the end of a choice. Returns the ending if it takes effect now; see `take_ending`."""
        state = self._choices.get(ending.choice)
        if state is None or state.over or attempt != state.attempt:
            return None
        if state.ending is None:
            state.ending = ending
        return self.take_ending(ending.choice)

    def take_ending(self, choice: int) -> Ending | None:
        """The announced ending, when every token before it is committed. It is returned once."""
        state = self._choices[choice]
        if state.over or state.ending is None or len(state.committed) < state.ending.num_tokens:
            return None
        state.over = True
        state.waiting.clear()
        return state.ending

    def stop(self, choice: int) -> bool:
        """The router itself ends the choice where it stands. False when it is over already."""
        state = self._choices[choice]
        was_over, state.over = state.over, True
        state.waiting.clear()
        return not was_over

    @staticmethod
    def _advance(state: _Choice) -> list[Token]:
        new: list[Token] = []
        while (token := state.waiting.pop(len(state.committed), None)) is not None:
            state.committed.append(token.token_id)
            new.append(token)
        return new
