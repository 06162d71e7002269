"""Bad and odd media at the front door of real processes: a typed error or the documented handling, memory bounded, and
the next request is served."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from answers import Answer, ask
from embedding_calls import EmbeddingCalls
from encoder_cluster import CANCEL_DEADLINE_S, EncoderCluster
from fault_worker import FaultProcess
from picture_questions import NUM_TOKENS, PAD, VIDEO_PAD, new_prompt
from PIL import Image
from vision_checkpoints import as_bytes, draw_picture, make_qwen2_5_vl

from kvrelay_client import AsyncClient
from kvrelay_client.requests import Media
from kvrelay_core.errors import InvalidRequestError, KvRelayError, UnsupportedError
from kvrelay_core.media.video import VideoFrames

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

SIZE = (64, 48)
BOMB_SIDE = 30_000
PROMPT = new_prompt(0, 1)
VIDEO_PROMPT = [VIDEO_PAD if token == PAD else token for token in PROMPT]
MIB = 1 << 20
# What refusing may cost: far below one pixel of a bomb each (900 MB), above what a request costs anyway.
REFUSAL_BYTES = 48 * MIB
LARGEST = 7_000 * 7_000  # pixels
FULL = pytest.mark.full


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncoderCluster]:
    model_dir = make_qwen2_5_vl(tmp_path_factory.mktemp("encoder-media") / "qwen2_5_vl")
    with EncoderCluster(model_dir, encoders=1, prefill=1) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: EncoderCluster) -> AsyncIterator[AsyncClient]:
    """After the test nothing is left, no process has ended, and a good picture is answered."""
    pids = [worker.pids for worker in cluster.workers]
    async with AsyncClient(cluster.target) as client:
        yield client
        await asyncio.to_thread(cluster.assert_nothing_held, CANCEL_DEADLINE_S)
        assert [worker.pids for worker in cluster.workers] == pids
        await look(client, good())


async def look(client: AsyncClient, *media: Media, prompt: list[int] | None = None) -> Answer:
    return await ask(
        client, token_ids=prompt or PROMPT, media=media, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True
    )


@cache
def good(seed: int = 0) -> bytes:
    return as_bytes(draw_picture(*SIZE, seed=seed))


def as_png(data: bytes) -> bytes:
    """What is to be seen in it, upright, opaque and alone."""
    with Image.open(io.BytesIO(data)) as image:
        return as_bytes(image.convert("RGB"))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, pixels: bytes) -> bytes:
    """Greys of one bit; `pixels` as they are before compression, whatever the header says."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")


@cache
def bomb() -> bytes:
    """A whole file, half a megabyte small."""
    return png(BOMB_SIDE, BOMB_SIDE, bytes((1 + -(-BOMB_SIDE // 8)) * BOMB_SIDE))


def lying_png() -> bytes:
    """64 x 48 by its header, and the pixels of a bomb."""
    return png(*SIZE, bytes((1 + -(-BOMB_SIDE // 8)) * BOMB_SIDE))


def short_png() -> bytes:
    """64 x 48 by its header, and the pixels of two rows."""
    return png(*SIZE, bytes(2 * 9))


def lying_webp() -> bytes:
    """A canvas of another size than the picture on it."""
    exif = Image.Exif()
    exif[0x0112] = 1
    data = bytearray(as_bytes(draw_picture(*SIZE), "WEBP", exif=exif))
    assert data[12:16] == b"VP8X"
    data[24:27] = (4_000).to_bytes(3, "little")
    return bytes(data)


def lying_jpeg() -> bytes:
    """Its frame says 7,000 x 7,000, its scan has 64 x 48."""
    data = as_bytes(draw_picture(*SIZE), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 7_000, 7_000) + data[at + 4 :]


BAD: dict[str, bytes | str] = {
    "zero bytes": b"",
    "truncated png": good()[:-200],
    "truncated jpeg": as_bytes(draw_picture(*SIZE), "JPEG")[:-300],
    "truncated webp": as_bytes(draw_picture(*SIZE), "WEBP")[:-200],
    "truncated header": good()[:20],
    "text": b"not an image at all",
    "pdf": b"%PDF-1.7" + bytes(100),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "tiff": as_bytes(draw_picture(*SIZE), "TIFF"),
    "a webp that lies": lying_webp(),
    "no base64": "data:image/png;base64,!!!",
    "a data URL of text": "data:text/plain;base64,aGVsbG8=",
}


async def refused(client: AsyncClient, *media: Media, prompt: list[int] | None = None) -> KvRelayError:
    with pytest.raises(KvRelayError) as caught:
        await look(client, *media, prompt=prompt)
    return caught.value


@pytest.mark.parametrize("name", BAD)
async def test_bad_media_are_a_typed_error(client: AsyncClient, name: str) -> None:
    error = await refused(client, BAD[name])
    assert isinstance(error, (InvalidRequestError, UnsupportedError)), repr(error)
    assert "media" in error.message


async def test_a_good_picture_beside_a_bad_one_does_not_save_it(client: AsyncClient) -> None:
    """And the pins of the good one are given back."""
    error = await refused(client, good(1), BAD["truncated png"], prompt=new_prompt(1, 2))
    assert isinstance(error, InvalidRequestError)


BAD_VIDEOS: dict[str, tuple[VideoFrames, str]] = {
    "no frames": (VideoFrames((), 2.0), "0 frames"),
    "too many frames": (VideoFrames((good(),) * 257, 2.0), "257 frames"),
    "no rate": (VideoFrames((good(),), 0.0), "fps is 0"),
    "frames of two sizes": (VideoFrames((good(), as_bytes(draw_picture(48, 64))), 2.0), "frames of one size"),
    "a frame that is none": (VideoFrames((good(), b"<html>"), 2.0), "frame 1 of a video: not an image"),
    "a frame cut off": (VideoFrames((good(), good(), good()[:-200]), 2.0), "frame 2 of a video: the image cannot"),
    "a bomb among them": (VideoFrames((good(), bomb()), 2.0), "frame 1 of a video: the image has more than"),
    "long and slow": (VideoFrames((good(),) * 8, 0.005), "lasts so long"),
}


@pytest.mark.parametrize("name", BAD_VIDEOS)
async def test_bad_videos_are_a_typed_error(client: AsyncClient, name: str) -> None:
    video, message = BAD_VIDEOS[name]
    error = await refused(client, video, prompt=VIDEO_PROMPT)
    assert isinstance(error, InvalidRequestError), repr(error)
    assert message in error.message, error.message


async def test_a_video_of_the_most_frames_is_taken(client: AsyncClient) -> None:
    frames = [as_bytes(draw_picture(16, 16, seed=seed)) for seed in range(2)] * 128
    answer = await look(client, VideoFrames(tuple(frames), 25.0), prompt=VIDEO_PROMPT)
    assert answer.end.usage.prompt_tokens == len(VIDEO_PROMPT) - 1 + 128 * 4


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/cat.png", "https://example.org/cat.png", "file:///etc/passwd"])
async def test_nothing_is_fetched(client: AsyncClient, url: str) -> None:
    error = await refused(client, url)
    assert isinstance(error, UnsupportedError) and error.status == "FAILED_PRECONDITION"
    assert "fetching of URLs is off" in error.message


async def test_two_hundred_images_are_too_many(client: AsyncClient) -> None:
    error = await refused(client, *[good()] * 200, prompt=new_prompt(2, 200))
    assert isinstance(error, InvalidRequestError) and "200 items" in error.message


# -------------------------------------------------------------------------------------------- odd, but taken


def turned() -> bytes:
    """Lies on its side; EXIF says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = draw_picture(*SIZE, seed=5)
    return as_bytes(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)


def animated() -> bytes:
    frames = [draw_picture(*SIZE, seed=seed) for seed in (6, 7, 8)]
    return as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])


def seen_through() -> Image.Image:
    picture = draw_picture(*SIZE, seed=9, mode="RGBA")
    picture.putalpha(draw_picture(*SIZE, seed=10, mode="L"))
    return picture


def over_white(picture: Image.Image) -> bytes:
    white = Image.new("RGBA", picture.size, "white")
    return as_bytes(Image.alpha_composite(white, picture).convert("RGB"))


CMYK = as_bytes(draw_picture(*SIZE, seed=11, mode="CMYK"), "JPEG")
ODD: dict[str, tuple[bytes, bytes]] = {
    "turned by EXIF": (turned(), as_bytes(draw_picture(*SIZE, seed=5))),
    "animated": (animated(), as_png(animated())),
    "cmyk": (CMYK, as_png(CMYK)),
    "alpha": (as_bytes(seen_through()), over_white(seen_through())),
}


@pytest.mark.parametrize("name", ODD)
async def test_odd_media_are_answered_like_the_plain_picture(client: AsyncClient, name: str) -> None:
    odd, plain = ODD[name]
    answers = [await look(client, picture) for picture in (odd, plain, good())]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].token_ids != answers[2].token_ids, "the picture matters"


# -------------------------------------------------------------------------------------------------- memory


class PeakMemory:
    """What a worker's processes needed at most while in the block, beyond what they had before."""

    def __init__(self, process: FaultProcess) -> None:
        self._pids = process.pids
        self.grown_bytes = 0

    def __enter__(self) -> PeakMemory:
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        self._before = {pid: _status_bytes(pid, "VmRSS") for pid in self._pids}
        return self

    def __exit__(self, *_: object) -> None:
        self.grown_bytes = max(_status_bytes(pid, "VmHWM") - before for pid, before in self._before.items())


def _status_bytes(pid: int, name: str) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


async def test_a_bomb_costs_no_memory(client: AsyncClient, cluster: EncoderCluster) -> None:
    """At the front door, and at the encoder itself."""
    data = bomb()
    [encoder] = cluster.encoders
    async with EmbeddingCalls(encoder.address, cluster.prefill[0].address) as calls:
        with PeakMemory(encoder) as at_encoder, PeakMemory(cluster.router) as at_router:
            error = await refused(client, data)
            assert isinstance(error, InvalidRequestError) and "pixels" in error.message
            with pytest.raises(InvalidRequestError):
                await calls.encode([data])
    print(f"encoder +{at_encoder.grown_bytes >> 20} MiB, router +{at_router.grown_bytes >> 20} MiB")
    assert max(at_encoder.grown_bytes, at_router.grown_bytes) < REFUSAL_BYTES


@pytest.mark.parametrize(
    ("make", "most_bytes"),
    [
        (lying_png, REFUSAL_BYTES),
        (short_png, REFUSAL_BYTES),
        pytest.param(lying_jpeg, 10 * LARGEST, marks=FULL),
    ],
)
async def test_a_header_that_lies_about_its_size_bounds_the_memory(
    client: AsyncClient, cluster: EncoderCluster, make: Callable[[], bytes], most_bytes: int
) -> None:
    """What is more than the header says is not decoded; what is less is an error, or black or grey."""
    data = make()
    with PeakMemory(cluster.encoders[0]) as at_encoder:
        try:
            await look(client, data)
        except InvalidRequestError as error:
            print(error.message)
    print(f"encoder +{at_encoder.grown_bytes >> 20} MiB")
    assert at_encoder.grown_bytes < most_bytes


@FULL
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
async def test_the_largest_pictures_that_are_taken(client: AsyncClient, cluster: EncoderCluster, mode: Any) -> None:
    """Two at once, and nothing is kept."""
    pictures = [as_bytes(Image.new(mode, (7_000, 7_000), shade), compress_level=1) for shade in range(2)]
    [encoder] = cluster.encoders
    before = _status_bytes(encoder.engine_pid, "VmRSS")
    with PeakMemory(encoder) as peak:
        await asyncio.gather(*(look(client, picture) for picture in pictures))
    left = _status_bytes(encoder.engine_pid, "VmRSS") - before
    print(f"{mode}: encoder +{peak.grown_bytes >> 20} MiB at most, +{left >> 20} MiB afterwards")
    assert peak.grown_bytes < 20 * LARGEST
    assert left < REFUSAL_BYTES
