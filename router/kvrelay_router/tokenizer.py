"""A checkpoint's tokenizer: text to token ids and back, chat messages to token ids.

Reads `tokenizer.json` by Hugging Face's `tokenizers`. A checkpoint without it serves prompts of token ids alone.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from kvrelay_core.checkpoint import read_json
from kvrelay_core.errors import ConfigError
from kvrelay_router.chat_template import ChatTemplate, load_chat_template

# Below this, a thread's switch costs more than the tokenization.
LONG_TEXT_CHARS = 2000
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)
        self.template = template
        self.is_byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
        vocab = tokenizer.get_vocab()
        self.longest_token_chars = max(map(len, vocab), default=1)
        self._bytes = frozenset(() if self.is_byte_level else (i for t, i in vocab.items() if _BYTE.fullmatch(t)))

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Long texts are tokenized in a thread."""
        if len(text) < LONG_TEXT_CHARS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Special tokens and ids that the tokenizer does not know have no text."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def text_of(self, token_id: int) -> str | None:
        """As it stands in the vocabulary; None for an id that it does not have."""
        text: str | None = self._tokenizer.id_to_token(token_id)
        return text

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one byte of a character that the vocabulary lacks (byte fallback)."""
        return token_id in self._bytes

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """None when the checkpoint has no `tokenizer.json`. Raises ConfigError when it cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"cannot read {path}: {error}; a newer `tokenizers` or another download may help") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(tokenizer, load_chat_template(folder, read_json(folder / "tokenizer_config.json")))
