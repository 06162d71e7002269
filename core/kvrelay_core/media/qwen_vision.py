"""How Qwen2-VL and its successors cut an image or a video into patches and tokens: arithmetic on sizes alone.

An image is made smaller or larger, keeping its shape as nearly as whole tokens allow, until its pixels lie between the
processor's bounds; so is each frame of a video, between bounds of its own. A patch reaches over temporal_patch_size
frames; a token stands for merge_size x merge_size patches.
"""

from __future__ import annotations

import math

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.processor_config import QwenProcessorConfig, QwenVideoConfig

Grid = tuple[int, int, int]  # patches in time, height, width

_MOST_ELONGATED = 200


def smart_resize(width: int, height: int, config: QwenProcessorConfig) -> tuple[int, int]:
    """Width and height in pixels that the image is brought to, both multiples of a token's side.

    Raises InvalidRequestError for an image that is more than 200 times as long as it is wide.
    """
    return _fit(width, height, config.patch_size * config.merge_size, config.min_pixels, config.max_pixels)


def resize_frames(num_frames: int, width: int, height: int, config: QwenProcessorConfig) -> tuple[int, int]:
    """As `smart_resize`, of each frame of a video."""
    video, side = _video_of(config), config.patch_size * config.merge_size
    largest = video.max_pixels
    if video.max_tokens is not None:
        share = int(video.max_tokens * side * side * 0.9) * config.temporal_patch_size // num_frames
        largest = max(min(largest, share), int(video.min_pixels * 1.05))
    return _fit(width, height, side, video.min_pixels, largest)


def _fit(width: int, height: int, side: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    if max(width, height) / min(width, height) > _MOST_ELONGATED:
        raise InvalidRequestError(
            f"media: the image is {width} x {height} pixels; one side may be at most {_MOST_ELONGATED} times the other",
            field="media",
        )
    nearest_w, nearest_h = round(width / side) * side, round(height / side) * side
    if nearest_w * nearest_h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        return (
            max(side, math.floor(width / shrink / side) * side),
            max(side, math.floor(height / shrink / side) * side),
        )
    if nearest_w * nearest_h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        return math.ceil(width * grow / side) * side, math.ceil(height * grow / side) * side
    return nearest_w, nearest_h


def image_grid(width: int, height: int, config: QwenProcessorConfig) -> Grid:
    """Of an image of that many pixels, upright. Raises InvalidRequestError as `smart_resize`."""
    resized_w, resized_h = smart_resize(width, height, config)
    return 1, resized_h // config.patch_size, resized_w // config.patch_size


def video_grid(num_frames: int, width: int, height: int, config: QwenProcessorConfig) -> Grid:
    """Of frames of that many pixels, upright; the last one counts again where they fill no patch.

    Raises InvalidRequestError as `smart_resize`.
    """
    resized_w, resized_h = resize_frames(num_frames, width, height, config)
    steps = -(-num_frames // config.temporal_patch_size)
    return steps, resized_h // config.patch_size, resized_w // config.patch_size


def seconds_per_grid(fps: float, config: QwenProcessorConfig) -> float:
    """From one step of a video's grid in time to the next."""
    return config.temporal_patch_size / fps


def num_tokens(grid: Grid, config: QwenProcessorConfig) -> int:
    """That stand for the grid in the prompt: as many as the tower gives rows."""
    return math.prod(grid) // config.merge_size**2


def _video_of(config: QwenProcessorConfig) -> QwenVideoConfig:
    assert config.video is not None, "asked for by nobody who does not take videos"
    return config.video
