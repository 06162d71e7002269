"""Text from tokens as they come: never half a character, and in the end exactly the text of all tokens at once.

A decoder turns an unfinished character into U+FFFD, so what may still change waits for the next token: a trailing
U+FFFD (the byte-level decoder may be one of a sequence of decoders), and of a decoder with byte fallback the whole run
of byte tokens, which it reads as one. Knows nothing of stop strings or choices.
"""

from __future__ import annotations

from kvrelay_router.tokenizer import Tokenizer

_UNDECIDED = "\ufffd"
# Tokens decoded together. A token's text may depend on those before it (a leading space), hence the context.
_CONTEXT = 8
_WINDOW = 24
_LONGEST_RUN = 256  # a byte run this long is not text; its characters are given up


class Detokenizer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that are out
        self._run = 0  # byte tokens since the last other one

    def push(self, token_id: int) -> str:
        """The text that this token decides, perhaps none."""
        if self._tokenizer.is_special(token_id):
            return ""
        self._window.append(token_id)
        self._run = self._run + 1 if self._tokenizer.is_byte(token_id) else 0
        text = self._tokenizer.decode(self._window)
        decided = self._decided(text)
        new = text[self._emitted : decided]
        self._emitted = max(self._emitted, decided)
        # A byte-level decoder's unfinished character lies within the last 3 bytes, so within the context.
        if len(self._window) >= _WINDOW and not self._in_run:
            self._window = self._window[-_CONTEXT:]
            self._emitted = self._decided(self._tokenizer.decode(self._window))
            self._run = 0
        return new

    def flush(self) -> str:
        """The tokens have ended: an unfinished character stays U+FFFD."""
        text = self._tokenizer.decode(self._window) if self._window else ""
        new = text[self._emitted :]
        self._window, self._emitted = [], 0
        return new

    @property
    def _in_run(self) -> bool:
        return 0 < self._run < _LONGEST_RUN

    def _decided(self, text: str) -> int:
        if self._in_run:
            return self._emitted
        return len(text) - text.endswith(_UNDECIDED)
