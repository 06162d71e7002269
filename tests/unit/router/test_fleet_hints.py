"""Where the router remembers KV of a conversation, its pictures included."""

from __future__ import annotations

import pytest
from fake_relay import RelayMaker
from msgspec.structs import replace

from kvrelay_core.request import Generation, MediaReference, SamplingParams

TOKENS = tuple(range(1, 301))  # 4 full units of 64 in the fake workers' layout
CAT = MediaReference(b"c" * 32, offset=70, num_tokens=20)
GENERATION = Generation(prompt=TOKENS, sampling=SamplingParams(), seed=0, media=(CAT,))


@pytest.mark.parametrize(
    ("media", "num_tokens"),
    [
        ((CAT,), 256),
        ((replace(CAT, content_hash=b"d" * 32),), 64),
        ((replace(CAT, offset=71),), 64),
        ((), 64),
    ],
)
async def test_a_hint_ends_where_another_picture_begins(
    make_relay: RelayMaker, media: tuple[MediaReference, ...], num_tokens: int
) -> None:
    relay = await make_relay()
    fleet = relay.server.fleet
    decode, prefill = relay.decode[0].address, relay.prefill[0].address
    fleet.note_kv(decode, GENERATION, TOKENS)
    hint = fleet.hint(prefill, replace(GENERATION, media=media))
    assert hint is not None and (hint.source_address, hint.num_tokens) == (decode, num_tokens)
