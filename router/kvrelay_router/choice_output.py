"""What a client sees of one choice: text from tokens, up to a stop string.

Token ids go out as they come; text follows when it is decided. Knows nothing of messages or streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay_core.request import TokenLogprobs
from kvrelay_router.committer import Token
from kvrelay_router.detokenizer import Detokenizer
from kvrelay_router.stop_strings import StopMatcher


@dataclass(slots=True)
class Piece:
    """What is new of a choice. `logprobs` is empty or as long as `token_ids`."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.text)


class ChoiceOutput:
    def __init__(self, detokenizer: Detokenizer | None, stops: tuple[str, ...]) -> None:
        """Without a detokenizer there is no text, and so no stop string is found."""
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self.num_tokens = 0

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the choice."""
        return self._matcher.matched

    def push(self, tokens: Sequence[Token]) -> Piece:
        """Tokens behind the one that completes a stop string are dropped."""
        piece = Piece()
        for token in tokens:
            if self.stop_string is not None:
                break
            self.num_tokens += 1
            piece.token_ids.append(token.token_id)
            if token.logprobs is not None:
                piece.logprobs.append(token.logprobs)
            if self._detokenizer is not None:
                piece.text += self._matcher.push(self._detokenizer.push(token.token_id))
        return piece

    def finish(self) -> Piece:
        """What was held back."""
        if self._detokenizer is None or self.stop_string is not None:
            return Piece()
        text = self._matcher.push(self._detokenizer.flush())
        return Piece(text=text + self._matcher.flush())
