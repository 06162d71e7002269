"""How Gemma 3 looks at an image: whole, squeezed into a square, and with pan-and-scan also in crops.

Every view has the same number of tokens. Arithmetic on sizes alone.
"""

from __future__ import annotations

import math

from kvrelay_core.media.processor_config import GemmaProcessorConfig, PanAndScan

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def crop_boxes(width: int, height: int, pan: PanAndScan | None) -> list[Box]:
    """The crops beside the whole image, along its longer side; none for one that is nearly square or too small."""
    if pan is None:
        return []
    longer, shorter = max(width, height), min(width, height)
    if longer / shorter < pan.min_ratio:
        return []
    fitting = min(math.floor(longer / shorter + 0.5), longer // pan.min_crop_size)
    count = min(max(fitting, 2), pan.max_crops)
    length = math.ceil(longer / count)
    if min(length, shorter) < pan.min_crop_size:
        return []
    starts = range(0, length * count, length)
    if width >= height:
        return [(start, 0, min(start + length, width), height) for start in starts]
    return [(0, start, width, min(start + length, height)) for start in starts]


def num_views(width: int, height: int, config: GemmaProcessorConfig) -> int:
    """The image itself and its crops."""
    return 1 + len(crop_boxes(width, height, config.pan_and_scan))
