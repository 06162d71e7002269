"""Size of a video's frames from their headers, and what is refused before a pixel is decoded.

What holds of an image holds of a frame, see `image_header`; beyond it all frames have one size.
"""

from __future__ import annotations

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.image_header import ImageHeader, read_image_header
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.video import VideoFrames, count_bytes

MIN_FPS, MAX_FPS = 1e-3, 1e3


def read_video_header(video: VideoFrames, limits: MediaLimits) -> ImageHeader:
    """Size of every frame, upright; the format is the first one's.

    Raises InvalidRequestError for frames that are no images or of several sizes, and for what is beyond the limits.
    """
    check_video(video, limits)
    headers = [_read_frame(index, frame, limits) for index, frame in enumerate(video.frames)]
    first = headers[0]
    for index, header in enumerate(headers):
        _require(
            (header.width, header.height) == (first.width, first.height),
            f"frame {index} is {header.width} x {header.height} pixels, frame 0 {first.width} x {first.height}; send "
            "frames of one size",
        )
    num_pixels = len(headers) * first.width * first.height
    _require(
        num_pixels <= limits.max_video_pixels,
        f"{len(headers)} frames of {first.width} x {first.height} are {num_pixels} pixels; allowed: "
        f"{limits.max_video_pixels} in all; send smaller frames, or fewer",
    )
    return first


def check_video(video: VideoFrames, limits: MediaLimits) -> None:
    """Of what can be told without a look into a frame. Raises InvalidRequestError."""
    num_frames, num_bytes = len(video.frames), count_bytes(video)
    _require(
        1 <= num_frames <= limits.max_video_frames,
        f"{num_frames} frames; allowed: 1 to {limits.max_video_frames}; sample fewer a second",
    )
    _require(
        num_bytes <= limits.max_item_bytes,
        f"the frames have {num_bytes} bytes together; allowed: {limits.max_item_bytes}; send smaller frames, or fewer",
    )
    _require(
        MIN_FPS <= video.fps <= MAX_FPS,
        f"fps is {video.fps:g}; say how many of the frames make a second, {MIN_FPS:g} to {MAX_FPS:g}",
    )


def _read_frame(index: int, frame: bytes, limits: MediaLimits) -> ImageHeader:
    try:
        return read_image_header(frame, limits)
    except InvalidRequestError as error:
        raise frame_error(index, error) from error


def frame_error(index: int, error: InvalidRequestError) -> InvalidRequestError:
    """What is wrong with an image, said of a video's frame."""
    return InvalidRequestError(
        f"media: frame {index} of a video: {error.message.removeprefix('media: ')}", **error.metadata
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(f"media: a video: {message}", field="media")
