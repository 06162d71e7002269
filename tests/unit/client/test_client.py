"""Both clients against a real router over fake workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_tokenizer import write_tokenizer
from fake_relay import Relay, RelayMaker
from fake_worker import VOCAB_SIZE, decode_well, prefill_well, token_of

from kvrelay_client import Client, Completion, Delta, Finish, ModelInfo, VideoFrames
from kvrelay_client.requests import GenerateOptions, build_request
from kvrelay_client.responses import collect
from kvrelay_core.errors import InternalError, InvalidRequestError, UnknownModelError, WorkerLostError
from kvrelay_core.request import FinishReason
from kvrelay_core.rpc.channel import MAX_MESSAGE_BYTES

TOKENS = [token_of(0, position) for position in range(4)]


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    (tmp_path / "config.json").write_text(json.dumps({}))
    write_tokenizer(tmp_path, VOCAB_SIZE, adds_begin_of_text=False)
    maker = RelayMaker(tmp_path)
    relay = await maker()
    relay.prefill[0].behaviour = prefill_well
    relay.decode[0].behaviour = decode_well
    yield relay
    await maker.close()


def test_placeholders_of_the_media() -> None:
    request = build_request(None, [1, 7, 7], None, {"media": [b"cat"], "placeholders": [(1, 1)]})
    assert [(run.offset, run.num_tokens) for run in request.placeholders.runs] == [(1, 1)]
    assert build_request(None, [7], None, {"placeholders": []}).HasField("placeholders")
    assert not build_request(None, [7], None, {}).HasField("placeholders")


def test_a_request_that_no_message_holds_is_refused_here() -> None:
    around = build_request(None, [1], None, {"media": [bytes(MAX_MESSAGE_BYTES // 2)] * 2}, max_bytes=2**40).ByteSize()
    largest = bytes(MAX_MESSAGE_BYTES // 2 - (around - MAX_MESSAGE_BYTES))
    options: GenerateOptions = {"media": [bytes(MAX_MESSAGE_BYTES // 2), largest]}
    assert build_request(None, [1], None, options).ByteSize() == MAX_MESSAGE_BYTES
    options["media"] = [*options["media"], b""]
    with pytest.raises(InvalidRequestError, match=r"of media; a message may have 33554432\. Send fewer or smaller"):
        build_request(None, [1], None, options)


async def test_events_of_a_stream(relay: Relay) -> None:
    async with relay.client.generate("hi", max_tokens=4) as stream:
        events = [event async for event in stream]
    deltas = [event for event in events if isinstance(event, Delta)]
    assert [token for delta in deltas for token in delta.token_ids] == TOKENS
    assert isinstance(events[-1], Finish) and events[-1].reason is FinishReason.LENGTH


def test_content_parts_and_media() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": b"cat"},
        {"type": "image", "image": "data:;base64,AA=="},
        {"type": "image_url", "image_url": {"url": "data:;base64,AA==", "detail": "low"}},
    ]
    request = build_request(None, None, [{"role": "user", "content": parts}, {"role": "user", "content": "b"}], {})
    first, second = request.messages.messages
    assert [part.WhichOneof("part") for part in first.content] == ["text", "media", "media", "media"]
    assert (first.content[1].media.data, first.content[3].media.url) == (b"cat", "data:;base64,AA==")
    assert [part.text for part in second.content] == ["b"]
    request = build_request(None, [1], None, {"media": [b"cat", "data:;base64,AA=="]})
    assert [item.WhichOneof("source") for item in request.media] == ["data", "url"]


def test_a_video_is_frames_and_their_rate() -> None:
    parts = [
        {"type": "video", "video": [b"one", b"two"], "fps": 2},
        {"type": "video", "video": VideoFrames((b"three",), 0.5)},
    ]
    request = build_request(None, None, [{"role": "user", "content": parts}], {})
    videos = [part.media.video for part in request.messages.messages[0].content]
    assert [(list(video.frames), video.fps) for video in videos] == [([b"one", b"two"], 2.0), ([b"three"], 0.5)]
    request = build_request("x", None, None, {"media": [VideoFrames((b"four",), 1.0)]})
    assert request.media[0].video.frames == [b"four"]


@pytest.mark.parametrize(
    "part",
    [{"type": "video", "video": [b"one"]}, {"type": "audio"}, {"type": "text"}, {"type": "image", "image": 5}, {}],
)
def test_unknown_content_parts_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="a content part must be"):
        build_request(None, None, [{"role": "user", "content": [part]}], {})


async def test_leaving_a_stream_cancels_it(relay: Relay) -> None:
    relay.decode[0].behaviour = None
    async with relay.client.generate("hi", max_tokens=4) as stream:
        await anext(stream)
        call = await relay.decode[0].next_call()
    await asyncio.wait_for(call.aborted.wait(), 5)


async def test_several_choices(relay: Relay) -> None:
    answers = await relay.client.complete_all("hi", max_tokens=4, n=2)
    assert [answer.index for answer in answers] == [0, 1]
    assert answers[0].token_ids == TOKENS != answers[1].token_ids
    with pytest.raises(InvalidRequestError, match="complete_all"):
        await relay.client.complete("hi", n=2)


def use_blocking_client(address: str) -> tuple[Completion, list[Any], ModelInfo]:
    with Client(address) as client:
        with pytest.raises(UnknownModelError):
            client.complete("hi", model="other")
        with pytest.raises(UnknownModelError):
            client.model_info("other")
        with client.generate(token_ids=[1, 2], max_tokens=4) as stream:
            events = list(stream)
        return client.complete("hi", max_tokens=4, temperature=0), events, client.model_info()


async def test_the_blocking_client_does_the_same(relay: Relay) -> None:
    answer, events, info = await asyncio.to_thread(use_blocking_client, relay.address)
    assert (answer.token_ids, answer.text, answer.finish_reason) == (TOKENS, "abcd", FinishReason.LENGTH)
    assert answer.usage.completion_tokens == 4
    assert isinstance(events[-1], Finish)
    assert info.accepts_messages


async def test_a_router_that_is_not_there_is_typed(relay: Relay) -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(WorkerLostError):
            await asyncio.to_thread(client.complete, "hi")


def test_requests_carry_what_was_asked_for() -> None:
    request = build_request(
        None, [1, 2], None, {"temperature": 0.0, "stop": "x", "ttft_ms": 5.0, "model": "m", "logit_bias": {3: 1.0}}
    )
    assert list(request.token_ids.ids) == [1, 2]
    assert request.sampling.HasField("temperature") and not request.sampling.HasField("top_p")
    assert list(request.sampling.stop) == ["x"] and dict(request.sampling.logit_bias) == {3: 1.0}
    assert (request.slo.ttft_ms, request.model) == (5.0, "m")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, None, None, {}), "exactly one"),
        ((None, None, [{"role": "user"}], {}), "a role and a content"),
        (("a", [1], None, {}), "exactly one"),
        (("a", None, None, {"temprature": 1.0}), "unknown option 'temprature'"),
        ((None, [-1], None, {}), "does not fit"),
        (("a", None, None, {"max_tokens": -1}), "does not fit"),
        (("a", None, None, {"seed": "x"}), "does not fit"),
    ],
)
def test_requests_that_cannot_be_sent(arguments: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        build_request(*arguments)


def test_a_stream_without_its_end_is_no_answer() -> None:
    with pytest.raises(InternalError):
        collect([Delta(0, (1,), "a")])
