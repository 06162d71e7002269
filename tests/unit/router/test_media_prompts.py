"""Prompts with images get the token ids of transformers' processors, and references to where images stand."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_checkpoints import encode_image, gemma_id, qwen_id, write_gemma, write_qwen
from PIL import Image

from kvrelay.v1 import common_pb2
from kvrelay.v1 import inference_pb2 as pb
from kvrelay_core.errors import ConfigError, InvalidRequestError, KvRelayError, UnsupportedError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.references import check_references
from kvrelay_router.main import load_checkpoint
from kvrelay_router.prompt import Prompt, PromptReader

LIMITS = MediaLimits(max_items=10)
PAD = qwen_id("<|image_pad|>")
# Of several shapes: nearly square, wide and tall enough for crops, tiny.
IMAGES = [
    encode_image(100, 80),
    encode_image(200, 40, color="blue"),
    encode_image(30, 90, "JPEG"),
    encode_image(3, 2),
    encode_image(
        40,
        120,
        "JPEG",
        exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06" + bytes(8),
    ),
]
Part = str | int  # text, or the index of an image


@dataclass
class Family:
    name: str
    processor: Any
    reader: PromptReader
    pad: int

    def expected(self, messages: list[tuple[str, list[Part]]]) -> list[int]:
        turns = [{"role": role, "content": list(map(reference_part, parts))} for role, parts in messages]
        crops = getattr(self.processor.image_processor, "do_pan_and_scan", None)
        options = {"processor_kwargs": {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}} if crops else {}
        ids = self.processor.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=True, **options
        )["input_ids"]
        return list(ids[0])

    async def read(self, messages: list[tuple[str, list[Part]]]) -> Prompt:
        wire = [pb.ChatMessage(role=role, content=map(part_of, parts)) for role, parts in messages]
        return await self.reader.read(pb.GenerateRequest(messages=pb.ChatMessages(messages=wire)), 10**6, b"tower")


def reference_part(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": Image.open(io.BytesIO(IMAGES[part]))}


def part_of(part: Part) -> pb.ContentPart:
    if isinstance(part, str):
        return pb.ContentPart(text=part)
    return pb.ContentPart(media=common_pb2.MediaItem(mime_type="image/png", data=IMAGES[part]))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    made = {}
    for name in ("qwen", "gemma", "gemma_crops"):
        folder = tmp_path_factory.mktemp(name)
        if name == "qwen":
            processor, pad = write_qwen(folder, min_pixels=28 * 28 * 2, max_pixels=28 * 28 * 12), PAD
        else:
            crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16} if name == "gemma_crops" else {}
            processor, pad = write_gemma(folder, **crops), gemma_id("<image_soft_token>")
        made[name] = Family(name, processor, reader_of(folder), pad)
    return made


def reader_of(folder: Path) -> PromptReader:
    checkpoint = load_checkpoint(str(folder))
    return PromptReader(checkpoint.tokenizer, checkpoint.processor, LIMITS)


def check(family: Family, prompt: Prompt, images: list[int]) -> None:
    """Every placeholder belongs to the reference of its image, in order."""
    check_references(prompt.media, len(prompt.token_ids))
    covered = [at for item in prompt.media for at in range(item.offset, item.offset + item.num_tokens)]
    assert covered == [at for at, token in enumerate(prompt.token_ids) if token == family.pad]
    assert [item.content_hash for item in prompt.items] == [media_hash(IMAGES[index], b"tower") for index in images]
    first_runs = [item.content_hash for item in prompt.media if not item.first_row]
    assert first_runs == [item.content_hash for item in prompt.items]


LAYOUTS: list[list[Part]] = [
    ["no image at all"],
    [0, "what is this?"],
    ["look at ", 1, " and tell"],
    ["last comes ", 2],
    [0, 1, 2],
    ["a\n", 1, "\n\nb\n\n", 1, "\n", 3],
    [4, "turned"],
    ["\n", 2, "\n"],
]


@pytest.mark.parametrize("name", ["qwen", "gemma", "gemma_crops"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
async def test_messages_equal_the_reference(families: dict[str, Family], name: str, layout: list[Part]) -> None:
    family = families[name]
    messages: list[tuple[str, list[Part]]] = [("user", layout)]
    if all(isinstance(part, str) for part in layout):
        messages.append(("user", [0]))
    prompt = await family.read(messages)
    assert list(prompt.token_ids) == family.expected(messages)
    check(family, prompt, [part for _, parts in messages for part in parts if isinstance(part, int)])


@pytest.mark.parametrize("name", ["qwen", "gemma", "gemma_crops"])
@settings(max_examples=40, deadline=None)
@given(
    layout=st.lists(
        st.lists(st.integers(0, 4) | st.text("ab \n<", min_size=1, max_size=4), min_size=1, max_size=4)
        .map(lambda parts: [0, *parts]),
        min_size=1,
        max_size=2,
    )
)  # fmt: skip
async def test_any_layout_equals_the_reference(
    families: dict[str, Family], name: str, layout: list[list[Part]]
) -> None:
    family = families[name]
    messages = [("user", parts) for parts in layout]
    prompt = await family.read(messages)
    assert list(prompt.token_ids) == family.expected(messages)
    check(family, prompt, [part for _, parts in messages for part in parts if isinstance(part, int)])


@pytest.mark.parametrize("name", ["qwen", "gemma", "gemma_crops"])
async def test_text_with_marks_equals_the_reference(families: dict[str, Family], name: str) -> None:
    family = families[name]
    mark = "<|image_pad|>" if name == "qwen" else "<start_of_image>"
    text = f"one {mark} two\n{mark}"
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16} if name == "gemma_crops" else {}
    images = [Image.open(io.BytesIO(IMAGES[index])) for index in (1, 0)]
    expected = family.processor(text=text, images=images, **crops)["input_ids"][0]
    media = [common_pb2.MediaItem(data=IMAGES[index]) for index in (1, 0)]
    prompt = await family.reader.read(pb.GenerateRequest(text=text, media=media), 10**6, b"tower")
    assert list(prompt.token_ids) == list(expected)
    check(family, prompt, [1, 0])
    for given_ids in (expected, [*collapsed(family, prompt)]):
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=given_ids), media=media)
        again = await family.reader.read(request, 10**6, b"tower")
        assert list(again.token_ids) == list(expected) and again.media == prompt.media


def collapsed(family: Family, prompt: Prompt) -> list[int]:
    """With one placeholder for each run."""
    starts = {item.offset for item in prompt.media}
    return [token for at, token in enumerate(prompt.token_ids) if token != family.pad or at in starts]


def with_runs(ids: list[int], runs: list[tuple[int, int]], images: list[int]) -> pb.GenerateRequest:
    placeholders = pb.Placeholders(runs=[pb.PlaceholderRun(offset=at, num_tokens=length) for at, length in runs])
    media = [common_pb2.MediaItem(data=IMAGES[index]) for index in images]
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), media=media, placeholders=placeholders)


@pytest.mark.parametrize("name", ["qwen", "gemma", "gemma_crops"])
async def test_a_placeholder_that_the_model_said_is_a_token_like_any_other(
    families: dict[str, Family], name: str
) -> None:
    """Before, between and behind those of the images, which are given as one or as all."""
    family = families[name]
    prompt = await family.read([("user", [1, "and", 0])])
    said, ids = [family.pad, 5, family.pad], list(prompt.token_ids)
    runs = [(item.offset + len(said), item.num_tokens) for item in prompt.media]
    told = await family.reader.read(with_runs([*said, *ids, *said], runs, [1, 0]), 10**6, b"tower")
    assert list(told.token_ids) == [*said, *ids, *said]
    assert [(item.offset, item.num_tokens) for item in told.media] == runs
    assert [item.first_row for item in told.media] == [item.first_row for item in prompt.media]
    short = collapsed(family, prompt)
    starts = [(at + len(said), 1) for at, token in enumerate(short) if token == family.pad]
    again = await family.reader.read(with_runs([*said, *short, *said], starts, [1, 0]), 10**6, b"tower")
    assert again == told


async def test_without_images_every_placeholder_may_be_the_models_own(families: dict[str, Family]) -> None:
    prompt = await families["qwen"].reader.read(with_runs([1, PAD, 2], [], []), 10**6, b"tower")
    assert (list(prompt.token_ids), prompt.media) == ([1, PAD, 2], ())


@pytest.mark.parametrize(
    ("ids", "runs", "message"),
    [
        ([1, PAD, 2], [], "0 runs of placeholders are given, the request's media have 1 views"),
        ([1, PAD, 2, PAD], [(1, 1), (3, 1)], "2 runs"),
        ([1, PAD, PAD], [(1, 2)], "2 placeholders are given at token 1; this image needs 1 .* or all 12"),
        ([1, PAD, 2], [(0, 1)], "interrupted"),
        ([1, PAD, 2], [(3, 1)], "interrupted"),
        ([1, *[PAD] * 11], [(1, 12)], "interrupted"),
        ([1, PAD], [(1, 0)], "0 placeholders"),
    ],
)
async def test_placeholders_that_do_not_fit_are_refused(
    families: dict[str, Family], ids: list[int], runs: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await families["qwen"].reader.read(with_runs(ids, runs, [0]), 10**6, b"tower")


async def test_placeholders_of_two_images_come_in_order(families: dict[str, Family]) -> None:
    with pytest.raises(InvalidRequestError, match="behind those of the item before it"):
        await families["qwen"].reader.read(with_runs([1, PAD, PAD], [(2, 1), (1, 1)], [0, 0]), 10**6, b"tower")


async def test_only_in_token_ids_their_places_are_known(families: dict[str, Family]) -> None:
    request = pb.GenerateRequest(text="<|image_pad|>", media=[item()], placeholders=pb.Placeholders())
    with pytest.raises(InvalidRequestError, match="in token_ids alone, not in text"):
        await families["qwen"].reader.read(request, 10**6, b"tower")


async def test_grids_and_rows(families: dict[str, Family]) -> None:
    prompt = await families["qwen"].read([("user", [0, 1])])
    assert [item.grid for item in prompt.media] == [(1, 6, 8), (1, 2, 14)]  # brought to 112 x 84 and 196 x 28
    assert [item.num_tokens for item in prompt.media] == [12, 7]
    crops = await families["gemma_crops"].read([("user", [1, 0])])
    assert [(item.first_row, item.num_tokens) for item in crops.media] == [
        (0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (0, 4), (4, 4), (8, 4),
    ]  # fmt: skip


def item(data: bytes = IMAGES[0], **more: Any) -> common_pb2.MediaItem:
    return common_pb2.MediaItem(data=data, **more)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (pb.GenerateRequest(text="no mark", media=[item()]), InvalidRequestError, "0 marks"),
        (pb.GenerateRequest(text="<|image_pad|>"), InvalidRequestError, "1 marks .* for 0 images and videos"),
        (pb.GenerateRequest(text="<|image_pad|>" * 2, media=[item()]), InvalidRequestError, "2 marks"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]), media=[item()]), InvalidRequestError, "0 placeholders"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, PAD])), InvalidRequestError, "1 placeholders"),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[PAD] * 7 + [1] + [PAD] * 5), media=[item()]),
            InvalidRequestError,
            "interrupted",
        ),
        (
            pb.GenerateRequest(text="<|image_pad|>" * 11, media=[item()] * 11),
            InvalidRequestError,
            "11 items; allowed: 10",
        ),
        (pb.GenerateRequest(text="<|image_pad|>", media=[item(b"")]), InvalidRequestError, "no bytes"),
        (pb.GenerateRequest(text="<|image_pad|>", media=[item(b"PNG?")]), InvalidRequestError, "not an image"),
        (
            pb.GenerateRequest(text="<|image_pad|>", media=[item(encode_image(1, 300))]),
            InvalidRequestError,
            "200 times",
        ),
        (
            pb.GenerateRequest(text="<|image_pad|>", media=[common_pb2.MediaItem(url="https://example.org/cat.png")]),
            UnsupportedError,
            "fetching of URLs is off",
        ),
        (
            pb.GenerateRequest(text="<|image_pad|>", media=[item(mime_type="video/mp4")]),
            UnsupportedError,
            "video/mp4",
        ),
        (
            pb.GenerateRequest(
                messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=[pb.ContentPart(text="a")])]),
                media=[item()],
            ),
            InvalidRequestError,
            "content parts",
        ),
    ],
)
async def test_what_does_not_fit_together_is_refused(
    families: dict[str, Family], request_: pb.GenerateRequest, error: type[KvRelayError], message: str
) -> None:
    with pytest.raises(error, match=message):
        await families["qwen"].reader.read(request_, 10**6, b"tower")


async def test_a_mark_in_somebodys_text_does_not_take_an_images_place(families: dict[str, Family]) -> None:
    with pytest.raises(InvalidRequestError, match="2 marks"):
        await families["qwen"].read([("user", ["<|image_pad|>", 0])])


def test_a_tokenizer_without_the_placeholders_is_refused(tmp_path: Path) -> None:
    write_qwen(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "image_token_id": 99999}')
    with pytest.raises(ConfigError, match="99999"):
        reader_of(tmp_path)
