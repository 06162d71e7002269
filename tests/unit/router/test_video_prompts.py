"""Prompts with videos: their placeholders, grids and times, and what is refused. That the placeholders are as many as
those of transformers is shown by `tests/golden` and by the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_worker import MAX_MODEL_LEN, VOCAB_SIZE
from media_checkpoints import encode_image, gemma_id, qwen_id, write_gemma, write_qwen

from kvrelay.v1 import common_pb2
from kvrelay.v1 import inference_pb2 as pb
from kvrelay_core.checkpoint import GenerationDefaults
from kvrelay_core.errors import InvalidRequestError, KvRelayError, UnsupportedError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.video import VideoFrames
from kvrelay_core.request import MediaReference
from kvrelay_core.rpc.wire import media_content_to_wire
from kvrelay_router.config import RequestLimits
from kvrelay_router.main import load_checkpoint
from kvrelay_router.prompt import Prompt, PromptReader
from kvrelay_router.registry import ServedModel
from kvrelay_router.validation import RequestChecker

LIMITS = MediaLimits(max_video_frames=8)
IMAGE_PAD, VIDEO_PAD = qwen_id("<|image_pad|>"), qwen_id("<|video_pad|>")
START, END = qwen_id("<|vision_start|>"), qwen_id("<|vision_end|>")
IMAGE = encode_image(56, 56)
FRAME = encode_image(84, 56, "JPEG")
ODD = VideoFrames((FRAME,) * 5, 2.0)  # 3 steps of 3 x 2 tokens, a second apart
CLIP = VideoFrames((encode_image(28, 56),) * 2, 8.0)  # one step of 1 x 2


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> PromptReader:
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen(folder, min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    return reader_of(folder)


def reader_of(folder: Path) -> PromptReader:
    checkpoint = load_checkpoint(str(folder))
    return PromptReader(checkpoint.tokenizer, checkpoint.processor, LIMITS)


def part(content: str | bytes | VideoFrames) -> pb.ContentPart:
    if isinstance(content, str):
        return pb.ContentPart(text=content)
    return pb.ContentPart(media=media_content_to_wire(content))


def chat(*contents: str | bytes | VideoFrames) -> pb.GenerateRequest:
    message = pb.ChatMessage(role="user", content=map(part, contents))
    return pb.GenerateRequest(messages=pb.ChatMessages(messages=[message]))


async def read(reader: PromptReader, request: pb.GenerateRequest) -> Prompt:
    return await reader.read(request, 10**6, b"tower")


async def test_a_message_with_a_video(qwen: PromptReader) -> None:
    prompt = await read(qwen, chat("see ", ODD, " there"))
    ids = list(prompt.token_ids)
    at = ids.index(VIDEO_PAD)
    assert ids[at - 1 : at + 19] == [START, *[VIDEO_PAD] * 18, END]
    name = media_hash(ODD, b"tower")
    assert prompt.media == (MediaReference(name, at, 18, (3, 4, 6), seconds_per_grid=1.0),)
    assert [(item.content_hash, item.content) for item in prompt.items] == [(name, ODD)]


async def test_videos_and_images_in_any_order(qwen: PromptReader) -> None:
    layouts: list[list[str | bytes | VideoFrames]] = [
        [ODD, "a", IMAGE, CLIP], [IMAGE, ODD, "b", CLIP], [CLIP, IMAGE, ODD], [CLIP, CLIP],
    ]  # fmt: skip
    for contents in layouts:
        prompt = await read(qwen, chat(*contents))
        media = [content for content in contents if not isinstance(content, str)]
        assert [item.content_hash for item in prompt.media] == [media_hash(content, b"tower") for content in media]
        for content, item in zip(media, prompt.media, strict=True):
            pad = VIDEO_PAD if isinstance(content, VideoFrames) else IMAGE_PAD
            run = prompt.token_ids[item.offset - 1 : item.offset + item.num_tokens + 1]
            assert list(run) == [START, *[pad] * item.num_tokens, END]
            assert item.seconds_per_grid == (2 / content.fps if isinstance(content, VideoFrames) else 0)


async def test_text_and_token_ids_make_the_same_prompt(qwen: PromptReader) -> None:
    wire = [media_content_to_wire(ODD), media_content_to_wire(IMAGE)]
    text = "<|vision_start|><|video_pad|><|vision_end|>x<|image_pad|>"
    prompt = await read(qwen, pb.GenerateRequest(text=text, media=wire))
    collapsed = [START, VIDEO_PAD, END, prompt.token_ids[20], IMAGE_PAD]
    for ids in (prompt.token_ids, collapsed):
        again = await read(qwen, pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), media=wire))
        assert (list(again.token_ids), again.media) == (list(prompt.token_ids), prompt.media)


def by_ids(*ids: int, media: list[bytes | VideoFrames]) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), media=map(media_content_to_wire, media))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (by_ids(IMAGE_PAD, media=[CLIP]), "another kind"),
        (by_ids(VIDEO_PAD, media=[IMAGE]), "another kind"),
        (by_ids(VIDEO_PAD, 1, IMAGE_PAD, media=[IMAGE, CLIP]), "another kind"),
        (by_ids(VIDEO_PAD, 1, VIDEO_PAD, media=[CLIP]), "interrupted"),
        (by_ids(VIDEO_PAD, 1, media=[]), "1 placeholders"),
        (by_ids(*[VIDEO_PAD] * 3, media=[CLIP]), r"3 placeholders .* 1 to be expanded here, or all 2"),
        (
            pb.GenerateRequest(
                text="<|image_pad|><|video_pad|>", media=[media_content_to_wire(CLIP), media_content_to_wire(IMAGE)]
            ),
            r"mark 0 of the prompt is <\|image_pad\|>, that of media\[0\] is <\|video_pad\|>",
        ),
        (chat("<|video_pad|>", CLIP), "2 marks"),
        (chat(VideoFrames((FRAME, IMAGE), 1.0)), "frames of one size"),
        (chat(VideoFrames((FRAME,) * 9, 1.0)), "9 frames; allowed: 1 to 8"),
        (chat(VideoFrames((), 1.0)), "0 frames"),
        (chat(VideoFrames((FRAME,), 0.0)), "fps is 0"),
        (chat(VideoFrames((FRAME, b"RIFF"), 1.0)), "frame 1 of a video"),
        (chat(VideoFrames((encode_image(1, 300),), 1.0)), "200 times"),
    ],
)  # fmt: skip
async def test_what_does_not_fit_is_refused(qwen: PromptReader, request_: pb.GenerateRequest, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await read(qwen, request_)


async def test_a_container_is_refused(qwen: PromptReader) -> None:
    media = [common_pb2.MediaItem(mime_type="video/mp4", data=b"....ftyp")]
    with pytest.raises(UnsupportedError, match="a video's frames as images"):
        await read(qwen, pb.GenerateRequest(text="<|video_pad|>", media=media))


@pytest.mark.parametrize("family", ["gemma", "qwen without settings", "qwen without a token"])
async def test_models_without_videos_refuse_them(family: str, tmp_path: Path) -> None:
    pad = VIDEO_PAD
    if family == "gemma":
        write_gemma(tmp_path)
        pad = gemma_id("<image_soft_token>")
    else:
        write_qwen(tmp_path)
    if family == "qwen without settings":
        (tmp_path / "video_preprocessor_config.json").unlink()
    elif family == "qwen without a token":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "video_token_id": None}))
    reader = reader_of(tmp_path)
    for request in (chat("what is this?", CLIP), by_ids(pad, media=[CLIP])):
        with pytest.raises(UnsupportedError, match="takes no videos"):
            await read(reader, request)
    with pytest.raises(KvRelayError) as caught:
        await read(reader, chat(CLIP))
    assert caught.value.status == "FAILED_PRECONDITION"


# ----------------------------------------------------------------------------------------- how long a video may last


def checked(prompt: Prompt, **sampling: Any) -> int:
    """max_tokens of a request that is taken."""
    checker = RequestChecker("model", GenerationDefaults(), RequestLimits())
    request = pb.GenerateRequest(sampling=common_pb2.SamplingParams(**sampling))
    model = ServedModel(b"model", VOCAB_SIZE, MAX_MODEL_LEN)
    return checker.complete(request, prompt, model).generation.sampling.max_tokens


async def test_positions_that_a_long_video_takes_count_against_the_models_length(qwen: PromptReader) -> None:
    """Four positions make a second, as config.json does not say otherwise."""
    slow = VideoFrames(CLIP.frames * 2, 0.1)  # 2 steps of 2 tokens, 80 positions apart
    prompt = await read(qwen, by_ids(1, VIDEO_PAD, 2, media=[slow]))
    assert (len(prompt.token_ids), prompt.positions_ahead) == (6, 81 - 4)
    room = MAX_MODEL_LEN - 6 - 77
    assert checked(prompt) == checked(prompt, max_tokens=room) == room
    with pytest.raises(InvalidRequestError, match=f"1 to {room}"):
        checked(prompt, max_tokens=room + 1)
    longer = await read(qwen, by_ids(1, VIDEO_PAD, 2, media=[VideoFrames(CLIP.frames * 2, 8 / MAX_MODEL_LEN)]))
    with pytest.raises(InvalidRequestError, match="lasts so long"):
        checked(longer)


async def test_a_short_video_takes_no_more_positions_than_tokens(qwen: PromptReader) -> None:
    prompt = await read(qwen, by_ids(1, VIDEO_PAD, 2, media=[CLIP]))
    assert prompt.positions_ahead == 0
    assert checked(prompt) == MAX_MODEL_LEN - len(prompt.token_ids)
