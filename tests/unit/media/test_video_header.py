"""What a video has to be, told from its frames' headers; and that its name is that of its frames, order and rate."""

from __future__ import annotations

import pytest
from media_checkpoints import encode_image
from msgspec.structs import replace as changed

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.video import MediaContent, VideoFrames, count_bytes
from kvrelay_core.media.video_header import read_video_header

LIMITS = MediaLimits(max_video_frames=4, max_video_pixels=4 * 31 * 17, max_pixels=31 * 17, max_item_bytes=2000)
RED, BLUE = encode_image(31, 17), encode_image(31, 17, color="blue")
# A photograph of a camera that was turned: 17 x 31 in the file, upright 31 x 17.
TURNED = encode_image(
    17, 31, "JPEG",
    exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06" + bytes(8),
)  # fmt: skip


def test_frames_of_one_size_upright_whatever_their_format() -> None:
    video = VideoFrames((RED, encode_image(31, 17, "JPEG"), TURNED, encode_image(31, 17, "WEBP")), 2.0)
    header = read_video_header(video, LIMITS)
    assert (header.format, header.width, header.height) == ("PNG", 31, 17)


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ((), 1.0, "0 frames; allowed: 1 to 4"),
        ((RED,) * 5, 1.0, "5 frames; allowed: 1 to 4"),
        ((RED,), 0.0, "fps is 0"),
        ((RED,), -1.0, "fps is -1"),
        ((RED,), float("nan"), "fps is nan"),
        ((RED,), float("inf"), "fps is inf"),
        ((RED,), 1e-4, "0.001 to 1000"),
        ((RED, BLUE, encode_image(17, 31)), 1.0, "frame 2 is 17 x 31 pixels, frame 0 31 x 17; send frames of one size"),
        ((RED, b""), 1.0, "media: frame 1 of a video: the image has no bytes"),
        ((RED, RED[:20]), 1.0, "media: frame 1 of a video: not an image, or a broken one"),
        ((encode_image(32, 17),), 1.0, "frame 0 of a video: the image is 32 x 17 pixels; allowed: 527"),
        ((RED, RED + bytes(2000)), 1.0, "bytes together; allowed: 2000"),
    ],
)
def test_what_is_no_video_is_refused(frames: tuple[bytes, ...], fps: float, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        read_video_header(VideoFrames(frames, fps), LIMITS)
    assert caught.value.metadata["field"] == "media"


def test_all_frames_together_have_a_limit_of_pixels() -> None:
    video = VideoFrames((RED, RED, BLUE), 1.0)
    assert read_video_header(video, changed(LIMITS, max_video_pixels=3 * 31 * 17)).width == 31
    with pytest.raises(InvalidRequestError, match="3 frames of 31 x 17 are 1581 pixels; allowed: 1580 in all"):
        read_video_header(video, changed(LIMITS, max_video_pixels=3 * 31 * 17 - 1))


def test_a_videos_name_is_that_of_its_frames_their_order_and_their_rate() -> None:
    video = VideoFrames((b"one", b"two"), 2.0)
    others: list[MediaContent] = [
        VideoFrames((b"two", b"one"), 2.0), VideoFrames((b"one",), 2.0), VideoFrames((b"onetwo",), 2.0),
        VideoFrames((b"one", b"two"), 3.0), VideoFrames((b"one", b"two", b""), 2.0), b"one", b"onetwo",
    ]  # fmt: skip
    names = {media_hash(content, b"tower") for content in (video, *others)} | {media_hash(video, b"other tower")}
    assert len(names) == len(others) + 2
    assert media_hash(VideoFrames((b"one", b"two"), 2.0), b"tower") == media_hash(video, b"tower")
    assert count_bytes(video) == count_bytes(b"onetwo") == 6


def test_a_videos_name_never_changes() -> None:
    """Names live in other processes and on disks."""
    assert (
        media_hash(VideoFrames((b"one", b"two"), 2.0), b"tower").hex()
        == "914e0aa7515dc8e44d2b633d75f0bb66ff48848298c28c8edf80090cfc2e7284"
    )
