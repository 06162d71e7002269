"""The prompt of a request as token ids: given as such, as text, or as chat messages, with the places of its media.

Knows the tokenizer; nothing of sampling or workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.v1 import inference_pb2 as pb
from kvrelay_core.errors import InvalidRequestError, UnsupportedError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.processor_config import ProcessorConfig
from kvrelay_core.request import MediaReference
from kvrelay_router.media_input import MediaFetcher, MediaInput, media_items, read_media
from kvrelay_router.placeholders import Placeholders, Run, make_placeholders
from kvrelay_router.tokenizer import LONG_TEXT_CHARS, Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: Sequence[int]
    media: tuple[MediaReference, ...] = ()
    items: tuple[MediaInput, ...] = ()  # what `media` refer to
    positions_ahead: int = 0  # of the tokens behind it: their positions less their indices, where those are higher


class PromptReader:
    def __init__(
        self,
        tokenizer: Tokenizer | None,
        processor: ProcessorConfig | None,
        limits: MediaLimits,
        fetcher: MediaFetcher | None = None,
    ) -> None:
        """Without a fetcher, no URLs but `data:` are taken.

        Raises ConfigError when tokenizer and image processor do not fit each other."""
        self._tokenizer = tokenizer
        self._placeholders = make_placeholders(processor, tokenizer)
        self._limits = limits
        self._fetcher = fetcher

    @property
    def accepts_text(self) -> bool:
        return self._tokenizer is not None

    @property
    def placeholders(self) -> Placeholders | None:
        """None: the model takes no images."""
        return self._placeholders

    @property
    def fetches_urls(self) -> bool:
        return self._fetcher is not None

    @property
    def accepts_messages(self) -> bool:
        return self._tokenizer is not None and self._tokenizer.template is not None

    async def read(
        self,
        request: pb.GenerateRequest,
        max_model_len: int,
        encoder_fingerprint: bytes,
        on_media_bytes: Callable[[int], None] = lambda _: None,
    ) -> Prompt:
        """Long texts, messages and media are worked on in a thread. `on_media_bytes` is told of bytes that are fetched.

        Raises InvalidRequestError, or UnsupportedError when the checkpoint lacks a tokenizer or template, takes no
        videos, or media may not be fetched; UnavailableError when that failed."""
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequestError("no prompt; set one of text, token_ids, messages", field="prompt")
        items = await read_media(media_items(request), self._limits, encoder_fingerprint, self._fetcher, on_media_bytes)
        token_ids = await self._token_ids(request, kind, items, max_model_len)
        runs = _runs_of(request, kind)
        if self._placeholders is None:
            return Prompt(token_ids)
        token_ids, media = self._placeholders.expand(token_ids, items, runs)
        return Prompt(token_ids, media, items, self._placeholders.positions_ahead(media))

    async def _token_ids(
        self, request: pb.GenerateRequest, kind: str, items: Sequence[MediaInput], max_model_len: int
    ) -> Sequence[int]:
        """Of media, only as many placeholders as they have views."""
        if kind == "token_ids":
            return request.token_ids.ids
        if self._tokenizer is None:
            raise UnsupportedError(
                f"{kind}: the checkpoint has no tokenizer.json, so this server takes token_ids only", field=kind
            )
        text = request.text if kind == "text" else await self._render(self._tokenizer, request.messages)
        self._check_length(self._tokenizer, text, max_model_len, kind)
        if self._placeholders is not None:
            text = self._placeholders.write(text, items)
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
        if sum(len(part.text) for message in messages.messages for part in message.content) < LONG_TEXT_CHARS:
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


def _runs_of(request: pb.GenerateRequest, kind: str) -> list[Run] | None:
    if not request.HasField("placeholders"):
        return None
    if kind != "token_ids":
        raise InvalidRequestError(
            f"placeholders: their places are known in token_ids alone, not in {kind}", field="placeholders"
        )
    return [Run(run.offset, run.num_tokens) for run in request.placeholders.runs]


def _as_dict(message: pb.ChatMessage) -> dict[str, Any]:
    if not message.role:
        raise InvalidRequestError("messages: a message has no role; use user, assistant or system", field="messages")
    if any(part.HasField("media") for part in message.content):
        return {"role": message.role, "content": [_part_as_dict(part) for part in message.content]}
    return {"role": message.role, "content": "\n".join(part.text for part in message.content)}


def _part_as_dict(part: pb.ContentPart) -> dict[str, str]:
    """As the templates of models that see expect it."""
    if not part.HasField("media"):
        return {"type": "text", "text": part.text}
    return {"type": "video" if part.media.HasField("video") else "image"}
