"""A router over fake workers and fake encoders: what media a request may bring, and how they travel."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_encoder import FINGERPRINT
from fake_relay import RelayMaker
from image_relay import CAT, DOG, OX, PAD, ROWS, behave, done, look, seen
from media_checkpoints import write_qwen

from kvrelay_core.errors import (
    InvalidRequestError,
    OverloadedError,
    UnsupportedError,
)
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.rpc.channel import MAX_MESSAGE_BYTES
from kvrelay_router import encode_link


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_qwen(folder, min_pixels=56 * 56, max_pixels=56 * 56)
    return folder


@pytest.mark.parametrize(
    ("media", "error", "message"),
    [
        (b"no image", InvalidRequestError, "not an image"),
        (CAT[:20], InvalidRequestError, "broken"),
        ("https://example.org/cat.png", UnsupportedError, "fetching of URLs is off"),
    ],
)
async def test_bad_media_are_refused_before_anybody_is_asked(
    make_relay: RelayMaker, media: bytes | str, error: type[Exception], message: str
) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay)
    with pytest.raises(error, match=message):
        await done(relay.client.generate(token_ids=[1, PAD], media=[media], max_tokens=3))
    assert seen(relay) == [[]] and not relay.prefill[0].calls


async def test_the_bytes_of_all_requests_images_are_bounded(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1, media_limits=MediaLimits(max_bytes_in_progress=2 * len(CAT) + 100))
    behave(relay, num_tokens=None)
    first = look(relay, CAT)
    encode = await relay.encoders[0].next_call()
    with pytest.raises(OverloadedError, match="bytes of media"):
        await done(look(relay, DOG, OX))
    await done(look(relay))
    encode.succeed(ROWS)
    await done(first)
    relay.encoders[0].num_tokens = ROWS
    await done(look(relay, DOG))  # the bytes were given back


async def test_images_beyond_one_message_go_in_several(make_relay: RelayMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those may be that were fetched by URL."""
    monkeypatch.setattr(encode_link, "MAX_CALL_BYTES", len(CAT) + len(DOG))
    relay = await make_relay(num_encoders=1)
    behave(relay)
    await done(look(relay, CAT, DOG, OX))
    hashes = [media_hash(image, FINGERPRINT) for image in (CAT, DOG, OX)]
    assert [call.hashes for call in relay.encoders[0].calls] == [hashes[:2], hashes[2:]]
    (call,) = relay.prefill[0].calls.values()
    assert [reference.content_hash for reference in call.media] == hashes


async def test_a_request_as_large_as_a_message_is_served(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay)
    left = MAX_MESSAGE_BYTES - 100  # of what else is in the message
    cat, dog = (image + bytes(left // 2 - len(image)) for image in (CAT, DOG))  # what follows an image's end is nothing
    await done(look(relay, cat, dog))
    assert [len(call.hashes) for call in relay.encoders[0].calls] == [1, 1]


async def test_a_message_has_room_for_any_image() -> None:
    assert MediaLimits().max_item_bytes <= encode_link.MAX_CALL_BYTES < MAX_MESSAGE_BYTES - (1 << 20)


async def test_two_hundred_images_are_refused(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    with pytest.raises(InvalidRequestError, match="200 items; allowed: 32"):
        await done(look(relay, *[CAT] * 200))
