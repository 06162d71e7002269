"""A router over fake workers and fake encoders: images are encoded before prefill, elsewhere when that fails."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest
from fake_encoder import FINGERPRINT
from fake_relay import RelayMaker
from fake_worker import PrefillCall, prefill_well
from image_relay import CAT, DOG, OX, PAD, ROWS, behave, done, look, seen
from media_checkpoints import qwen_id, write_qwen

from kvrelay.v1 import worker_pb2
from kvrelay_core.errors import (
    DeadlineError,
    DrainingError,
    EmbeddingLostError,
    InvalidRequestError,
    MismatchError,
    OverloadedError,
    UnavailableError,
    UnsupportedError,
)
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.video import VideoFrames

VIDEO_PAD = qwen_id("<|video_pad|>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_qwen(folder, min_pixels=56 * 56, max_pixels=56 * 56)
    return folder


def sources(call: PrefillCall) -> list[str]:
    return [reference.ticket.source.worker_id for reference in call.media]


async def test_prefill_gets_a_ticket_for_each_image_and_decode_gets_none(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay)
    await done(look(relay, CAT, DOG, CAT))
    (call,) = relay.prefill[0].calls.values()
    hashes = [media_hash(image, FINGERPRINT) for image in (CAT, DOG, CAT)]
    assert [reference.content_hash for reference in call.media] == hashes
    assert [reference.ticket.content_hash for reference in call.media] == hashes
    assert [(item.offset, item.num_tokens, item.grid) for item in call.generation.media] == [
        (2, 4, (1, 4, 4)), (7, 4, (1, 4, 4)), (12, 4, (1, 4, 4)),
    ]  # fmt: skip
    assert call.generation.prompt == (1, 2, *[PAD] * 4, 3, *[PAD] * 4, 3, *[PAD] * 4, 3)
    (at_decode,) = relay.decode[0].calls.values()
    assert at_decode.generation.media == call.generation.media
    (encode,) = relay.encoders[0].calls
    assert [item.data for item in encode.request.media] == [CAT, DOG], "each image once"
    assert encode.request.attempt.request_id == call.attempt.request_id


async def test_a_video_is_one_item(make_relay: RelayMaker) -> None:
    """Another rate makes another one of the same frames."""
    relay = await make_relay(num_encoders=1)
    behave(relay)
    videos = [VideoFrames((CAT, DOG), 2.0), VideoFrames((CAT, DOG), 0.5)]
    ids = [1, VIDEO_PAD, 2, VIDEO_PAD, 3]
    await done(relay.client.generate(token_ids=ids, media=videos, max_tokens=3))
    (call,) = relay.prefill[0].calls.values()
    (encode,) = relay.encoders[0].calls
    assert [list(item.video.frames) for item in encode.request.media] == [[CAT, DOG]] * 2
    assert [item.video.fps for item in encode.request.media] == [2.0, 0.5]
    assert [reference.ticket.content_hash for reference in call.media] == encode.hashes
    assert [(item.offset, item.grid, item.seconds_per_grid) for item in call.generation.media] == [
        (1, (1, 4, 4), 1.0), (6, (1, 4, 4), 4.0),
    ]  # fmt: skip
    (at_decode,) = relay.decode[0].calls.values()
    assert at_decode.generation.media == call.generation.media


async def test_prefill_is_not_opened_before_the_images_are_encoded(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT)
    encode = await relay.encoders[0].next_call()
    assert not relay.prefill[0].calls
    encode.succeed(ROWS)
    await done(stream)


async def test_messages_with_images_and_data_urls(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay)
    url = "data:image/png;base64," + base64.b64encode(DOG).decode()
    parts = [
        {"type": "image", "image": CAT},
        {"type": "text", "text": "or"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    await done(relay.client.generate(messages=[{"role": "user", "content": parts}], max_tokens=3))
    (call,) = relay.prefill[0].calls.values()
    assert [item.content_hash for item in call.media] == [media_hash(CAT, FINGERPRINT), media_hash(DOG, FINGERPRINT)]
    assert call.generation.prompt.count(PAD) == 2 * ROWS
    assert seen(relay) == [[media_hash(CAT, FINGERPRINT), media_hash(DOG, FINGERPRINT)]]


async def test_text_asks_no_encoder(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay)
    await done(look(relay))
    assert seen(relay) == [[]]


async def test_who_has_an_image_is_asked_for_it_though_another_one_has_less_to_do(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=2)
    behave(relay)
    await done(look(relay, CAT))
    holder, other = sorted(relay.encoders, key=lambda encoder: len(encoder.calls), reverse=True)
    await holder.next_call()
    holder.num_tokens = None
    waiting = look(relay, OX)
    ox = await holder.next_call()  # of equals, the first by key
    await done(look(relay, DOG))
    assert [call.hashes for call in other.calls] == [[media_hash(DOG, FINGERPRINT)]]
    again = look(relay, CAT)
    (await holder.next_call()).succeed(ROWS)
    await done(again)
    ox.succeed(ROWS)
    await done(waiting)


async def test_many_images_are_spread_by_load(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=2)
    behave(relay)
    await done(look(relay, CAT, DOG))
    assert sorted(map(len, seen(relay))) == [1, 1]
    (call,) = relay.prefill[0].calls.values()
    assert sorted(sources(call)) == ["encoder-0", "encoder-1"]


@pytest.mark.parametrize("error", [OverloadedError("full"), DrainingError("draining"), UnavailableError("not now")])
async def test_what_one_encoder_refuses_another_one_gets(make_relay: RelayMaker, error: Exception) -> None:
    relay = await make_relay(num_encoders=2)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT)
    calls = [asyncio.ensure_future(encoder.next_call()) for encoder in relay.encoders]
    finished, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    finished.pop().result().fail(error)  # type: ignore[arg-type]
    (await waiting.pop()).succeed(ROWS)
    await done(stream)
    assert [len(items) for items in seen(relay)] == [1, 1]


async def test_an_encoder_that_dies_with_the_image_is_replaced_by_another(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=2)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT)
    calls = {asyncio.ensure_future(encoder.next_call()): encoder for encoder in relay.encoders}
    finished, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    await calls[finished.pop()].stop()
    (await waiting.pop()).succeed(ROWS)
    await done(stream)


async def test_a_call_ends_with_the_connection_that_its_encoder_is_watched_over(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=2)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT)
    calls = {asyncio.ensure_future(encoder.next_call()): encoder for encoder in relay.encoders}
    finished, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    calls[finished.pop()].reports_end.set()
    (await waiting.pop()).succeed(ROWS)
    await done(stream)


async def test_an_encoder_that_is_too_busy_to_tell_its_load_is_not_lost(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT)
    [encoder] = relay.encoders
    encode = await encoder.next_call()
    encoder.report_error = DeadlineError("the engine did not answer in time")
    encoder.reports_end.set()
    async with asyncio.timeout(5):
        while encoder.num_watches < 2:  # noqa: ASYNC110  # no event for it
            await asyncio.sleep(0.001)
    encode.succeed(ROWS)
    await done(stream)
    assert len(encoder.calls) == 1


async def test_the_only_encoder_is_waited_for_when_it_dies_and_comes_back(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1, placement_wait_s=10.0)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT)
    await relay.encoders[0].next_call()
    await relay.encoders[0].stop()
    await relay.encoders[0].start()
    (await relay.encoders[0].next_call(timeout_s=10.0)).succeed(ROWS)
    await done(stream)


async def test_without_an_encoder_in_time_the_request_says_so(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1, placement_wait_s=0.2)
    behave(relay)
    await relay.encoders[0].stop()
    (session,) = relay.server.registry.encoders.values()
    async with asyncio.timeout(5):
        await relay.server.registry.wait_until(lambda: not session.is_serving)
    with pytest.raises(UnavailableError, match="no encoder serves"):
        await done(look(relay, CAT))
    await done(look(relay))


async def test_a_broken_image_is_the_clients_fault_and_asked_of_nobody_else(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=2)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT)
    calls = [asyncio.ensure_future(encoder.next_call()) for encoder in relay.encoders]
    finished, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    finished.pop().result().fail(InvalidRequestError("the image is cut off"))
    with pytest.raises(InvalidRequestError, match="cut off"):
        await done(stream)
    (other,) = waiting
    other.cancel()
    assert sorted(map(len, seen(relay))) == [0, 1] and not relay.prefill[0].calls


async def test_an_encoder_that_counts_otherwise_is_a_mismatch(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay, num_tokens=ROWS + 1)
    with pytest.raises(MismatchError, match="5 tokens of an item that has 4"):
        await done(look(relay, CAT))


async def test_an_encoder_that_does_not_answer_is_given_up(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=2, encode_s=0.2)
    behave(relay)
    slow = min(relay.encoders, key=lambda encoder: encoder.address)  # of equals, the first by key
    slow.num_tokens = None
    await done(look(relay, CAT))
    assert len(slow.calls) == 1
    async with asyncio.timeout(5):
        await slow.calls[0].cancelled.wait()


async def test_a_lost_embedding_is_encoded_elsewhere_and_prefill_opened_again(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=2, max_replacements=0)
    behave(relay)
    relay.prefill[0].behaviour = None
    stream = look(relay, CAT)
    first = await relay.prefill[0].next_call()
    first.fail(EmbeddingLostError("its encoder restarted", media=media_hash(CAT, FINGERPRINT).hex()))
    second = await relay.prefill[0].next_call()
    await prefill_well(second)
    await done(stream)
    assert sorted(sources(first) + sources(second)) == ["encoder-0", "encoder-1"]
    assert second.attempt.attempt == first.attempt.attempt + 1


async def test_a_cancel_reaches_the_encoder(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT)
    encode = await relay.encoders[0].next_call()
    stream.cancel()
    async with asyncio.timeout(5):
        await encode.cancelled.wait()
    await relay.settled()
    assert not relay.prefill[0].calls


async def test_a_deadline_reaches_the_encoder(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay, num_tokens=None)
    stream = look(relay, CAT, timeout_s=0.5)
    encode = await relay.encoders[0].next_call()
    assert 0 < encode.request.deadline_s <= 0.5
    async with asyncio.timeout(5):
        await encode.cancelled.wait()
    with pytest.raises(Exception, match=r"(?i)deadline"):
        await done(stream)


async def test_without_an_encoder_in_the_list_images_are_refused_and_text_is_served(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=0)
    behave(relay)
    with pytest.raises(UnsupportedError, match="--encoder HOST:PORT") as caught:
        await done(look(relay, CAT))
    assert caught.value.status == "FAILED_PRECONDITION"
    await done(look(relay))


async def test_without_a_prefill_worker_images_are_refused(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_prefill=0, num_encoders=1)
    behave(relay)
    with pytest.raises(UnsupportedError, match="prefill worker"):
        await done(look(relay, CAT))


async def test_a_worker_of_another_role_is_kept_out(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    (session,) = relay.server.registry.encoders.values()
    await relay.encoders[0].stop()
    relay.encoders[0].role = worker_pb2.ROLE_DECODE
    await relay.encoders[0].start()
    async with asyncio.timeout(5):
        await relay.server.registry.wait_until(lambda: session.state.value == "refused")


async def test_an_encoder_with_another_tower_is_kept_out(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=2)
    behave(relay)
    first, second = relay.encoders
    await second.stop()
    second.fingerprint = b"another tower"
    await second.start()
    for _ in range(3):
        await done(look(relay, CAT))
    assert len(first.calls) >= 1
    assert not second.calls


async def test_another_tower_makes_another_item_of_the_same_picture(make_relay: RelayMaker) -> None:
    relay = await make_relay(num_encoders=1)
    behave(relay)
    (encoder,) = relay.encoders
    await done(look(relay, CAT))
    await encoder.stop()
    encoder.fingerprint = b"another tower"
    await encoder.start()
    await done(look(relay, CAT))
    assert [call.hashes for call in encoder.calls] == [
        [media_hash(CAT, FINGERPRINT)],
        [media_hash(CAT, b"another tower")],
    ]
    first, second = relay.prefill[0].calls.values()
    assert first.media[0].content_hash != second.media[0].content_hash
