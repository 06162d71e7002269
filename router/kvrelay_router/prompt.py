"""The prompt of a request as token ids: given as such, as text, or as chat messages.

Knows the tokenizer; nothing of sampling or workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from kvrelay.v1 import inference_pb2 as pb
from kvrelay_core.errors import InvalidRequestError, UnsupportedError
from kvrelay_router.tokenizer import LONG_TEXT_CHARS, Tokenizer


class PromptReader:
    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    @property
    def accepts_text(self) -> bool:
        return self._tokenizer is not None

    @property
    def accepts_messages(self) -> bool:
        return self._tokenizer is not None and self._tokenizer.template is not None

    async def read(self, request: pb.GenerateRequest, max_model_len: int) -> Sequence[int]:
        """Long texts and messages are worked on in a thread.

        Raises InvalidRequestError, or UnsupportedError when the checkpoint lacks a tokenizer or template."""
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequestError("no prompt; set one of text, token_ids, messages", field="prompt")
        if kind == "token_ids":
            return request.token_ids.ids
        if self._tokenizer is None:
            raise UnsupportedError(
                f"{kind}: the checkpoint has no tokenizer.json, so this server takes token_ids only", field=kind
            )
        text = request.text if kind == "text" else await self._render(self._tokenizer, request.messages)
        self._check_length(self._tokenizer, text, max_model_len, kind)
        # A chat template writes the special tokens itself.
        return await self._tokenizer.encode(text, add_special_tokens=kind == "text")

    async def _render(self, tokenizer: Tokenizer, messages: pb.ChatMessages) -> str:
        if tokenizer.template is None:
            raise UnsupportedError(
                "messages: the checkpoint has no chat template; send text or token_ids", field="messages"
            )
        if not messages.messages:
            raise InvalidRequestError("messages is empty; send at least one message", field="messages")
        turns = [_as_dict(message) for message in messages.messages]
        if sum(len(turn["content"]) for turn in turns) < LONG_TEXT_CHARS:
            return tokenizer.template.render(turns)
        return await asyncio.to_thread(tokenizer.template.render, turns)

    def _check_length(self, tokenizer: Tokenizer, text: str, max_model_len: int, kind: str) -> None:
        """Refuses what cannot fit before tokenizing it: no token stands for more characters than the longest."""
        most = max_model_len * tokenizer.longest_token_chars
        if len(text) > most:
            raise InvalidRequestError(
                f"{kind} has {len(text)} characters, which cannot fit into the model's {max_model_len} tokens; "
                f"allowed: well below {most} characters",
                field=kind,
            )


def _as_dict(message: pb.ChatMessage) -> dict[str, Any]:
    if not message.role:
        raise InvalidRequestError("messages: a message has no role; use user, assistant or system", field="messages")
    return {"role": message.role, "content": "\n".join(part.text for part in message.content)}
