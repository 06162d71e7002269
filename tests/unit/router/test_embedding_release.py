"""A router gives back the tickets of images that no prefill worker used, or lived to release."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fake_encoder import FINGERPRINT
from fake_relay import RelayMaker
from fake_worker import prefill_well
from image_relay import CAT, DOG, ROWS, behave, done, look
from media_checkpoints import write_qwen

from kvrelay_core.errors import MismatchError, OverloadedError
from kvrelay_core.media.media_hash import media_hash


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_qwen(folder, min_pixels=56 * 56, max_pixels=56 * 56)
    return folder


async def test_tickets_that_no_prefill_worker_gets_are_released(make_relay: RelayMaker) -> None:
    """One image is encoded, the other is not, and the client leaves."""
    relay = await make_relay(num_encoders=2)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT, DOG)
    calls = [await encoder.next_call() for encoder in relay.encoders]
    calls[0].succeed(ROWS)
    (session,) = [one for key, one in relay.server.registry.encoders.items() if key == relay.encoders[0].address]
    async with asyncio.timeout(5):
        while session.num_open:  # noqa: ASYNC110  # no event for it
            await asyncio.sleep(0.001)
    assert not relay.encoders[0].released
    stream.cancel()
    async with asyncio.timeout(5):
        await calls[1].cancelled.wait()
    await relay.settled()
    assert [encoder.released for encoder in relay.encoders] == [calls[0].hashes, []]


@pytest.mark.parametrize("how", ["refuses", "dies"])
async def test_tickets_that_a_prefill_worker_cannot_release_are_released(make_relay: RelayMaker, how: str) -> None:
    relay = await make_relay(num_encoders=1, num_prefill=2)
    behave(relay)
    for prefill in relay.prefill:
        prefill.behaviour = None
    stream = look(relay, CAT)
    calls = {asyncio.ensure_future(prefill.next_call()): prefill for prefill in relay.prefill}
    opened, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    (first,) = opened
    if how == "refuses":
        first.result().fail(OverloadedError("full"))
    else:
        await calls[first].stop()
    await prefill_well(await waiting.pop())
    await done(stream)
    await relay.settled()
    assert relay.encoders[0].released == [media_hash(CAT, FINGERPRINT)], (
        "that of the first attempt; prefill releases the other"
    )


async def test_tickets_that_do_not_fit_the_prompt_are_released(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay, num_tokens=ROWS + 1)
    with pytest.raises(MismatchError):
        await done(look(relay, CAT))
    await relay.settled()
    assert relay.encoders[0].released == [media_hash(CAT, FINGERPRINT)]
