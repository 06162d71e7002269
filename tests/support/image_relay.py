"""Requests with pictures to a router over fake workers and fake encoders."""

from __future__ import annotations

from typing import Any

from fake_relay import Relay, rest_of, tokens
from fake_worker import decode_well, prefill_well
from media_checkpoints import encode_image, qwen_id

from kvrelay_client import GenerateStream

PAD = qwen_id("<|image_pad|>")
CAT, DOG, OX = (encode_image(56, 56, color=color) for color in ("red", "blue", "green"))
ROWS = 4  # of each of them


def look(relay: Relay, *images: bytes, **options: Any) -> GenerateStream:
    ids = [1, 2, *(token for _ in images for token in (PAD, 3))]
    return relay.client.generate(token_ids=ids, media=images, max_tokens=3, **options)


def behave(relay: Relay, num_tokens: int | None = ROWS) -> None:
    for prefill in relay.prefill:
        prefill.behaviour = prefill_well
    for decode in relay.decode:
        decode.behaviour = decode_well
    for encoder in relay.encoders:
        encoder.num_tokens = num_tokens


async def done(stream: GenerateStream) -> None:
    ids, _ = await rest_of(stream)
    assert ids == tokens(3)


def seen(relay: Relay) -> list[list[bytes]]:
    """What each encoder was asked for, in order."""
    return [[item for call in encoder.calls for item in call.hashes] for encoder in relay.encoders]
