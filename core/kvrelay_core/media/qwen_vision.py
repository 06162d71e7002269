"""How Qwen2-VL and its successors cut an image into patches and tokens: arithmetic on sizes alone.

An image is made smaller or larger, keeping its shape as nearly as whole tokens allow, until its pixels lie between the
processor's bounds. A token stands for merge_size x merge_size patches.
"""

from __future__ import annotations

import math

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.processor_config import QwenProcessorConfig

Grid = tuple[int, int, int]  # patches in time, height, width

_MOST_ELONGATED = 200


def smart_resize(width: int, height: int, config: QwenProcessorConfig) -> tuple[int, int]:
    """Width and height in pixels that the image is brought to, both multiples of a token's side.

    Raises InvalidRequestError for an image that is more than 200 times as long as it is wide.
    """
    if max(width, height) / min(width, height) > _MOST_ELONGATED:
        raise InvalidRequestError(
            f"media: the image is {width} x {height} pixels; one side may be at most {_MOST_ELONGATED} times the other",
            field="media",
        )
    side = config.patch_size * config.merge_size
    nearest_w, nearest_h = round(width / side) * side, round(height / side) * side
    if nearest_w * nearest_h > config.max_pixels:
        shrink = math.sqrt(width * height / config.max_pixels)
        return (
            max(side, math.floor(width / shrink / side) * side),
            max(side, math.floor(height / shrink / side) * side),
        )
    if nearest_w * nearest_h < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (width * height))
        return math.ceil(width * grow / side) * side, math.ceil(height * grow / side) * side
    return nearest_w, nearest_h


def image_grid(width: int, height: int, config: QwenProcessorConfig) -> Grid:
    """Of an image of that many pixels, upright. Raises InvalidRequestError as `smart_resize`."""
    resized_w, resized_h = smart_resize(width, height, config)
    return 1, resized_h // config.patch_size, resized_w // config.patch_size


def num_tokens(grid: Grid, config: QwenProcessorConfig) -> int:
    """That stand for the grid in the prompt: as many as the tower gives rows."""
    return math.prod(grid) // config.merge_size**2
