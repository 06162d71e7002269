"""The arithmetic on sizes equals that of transformers' processors, for any size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.media.gemma_vision import crop_boxes
from kvrelay_core.media.processor_config import PanAndScan, PixelConfig, QwenProcessorConfig, QwenVideoConfig
from kvrelay_core.media.qwen_vision import image_grid, num_tokens, resize_frames, smart_resize, video_grid

PIXELS = PixelConfig(resample=3, rescale_factor=1 / 255, mean=(0, 0, 0), std=(1, 1, 1))
SIDE = st.integers(1, 12_000)


def qwen(
    patch_size: int = 14, merge_size: int = 2, min_pixels: int = 3136, max_pixels: int = 1003520
) -> QwenProcessorConfig:
    return QwenProcessorConfig(
        pixels=PIXELS, patch_size=patch_size, temporal_patch_size=2, merge_size=merge_size, min_pixels=min_pixels,
        max_pixels=max_pixels, image_token_id=1, tokens_per_second=2,
    )  # fmt: skip


@given(
    SIDE,
    SIDE,
    st.sampled_from([(14, 2), (16, 2), (14, 1), (8, 4)]),
    st.sampled_from([(3136, 1003520), (3136, 12845056), (65536, 65536 * 4), (1, 784)]),
)
@example(1, 1, (14, 2), (3136, 1003520))
@example(1, 200, (14, 2), (3136, 1003520))
@example(42, 70, (14, 2), (1, 10**9))  # halves are rounded to even
def test_qwen_sizes_equal_the_reference(
    width: int, height: int, patch: tuple[int, int], bounds: tuple[int, int]
) -> None:
    config = qwen(*patch, *bounds)
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch[0], merge_size=patch[1], min_pixels=bounds[0], max_pixels=bounds[1]
    )
    try:
        expected = reference_resize(height, width, patch[0] * patch[1], *bounds)
    except ValueError:
        with pytest.raises(InvalidRequestError, match="200"):
            smart_resize(width, height, config)
        return
    assert smart_resize(width, height, config) == expected[::-1]
    grid = image_grid(width, height, config)
    assert math.prod(grid) == processor.get_number_of_image_patches(height, width)
    assert num_tokens(grid, config) * patch[1] ** 2 == math.prod(grid)


def video_config(min_pixels: int, max_pixels: int, max_tokens: int | None = None) -> QwenProcessorConfig:
    video = QwenVideoConfig(
        pixels=PIXELS, min_pixels=min_pixels, max_pixels=max_pixels, max_tokens=max_tokens, token_id=2
    )
    return structs.replace(qwen(), video=video)


@given(SIDE, SIDE, st.integers(1, 9), st.sampled_from([(100352, 602112), (3136, 12845056)]))
def test_frames_of_a_video_have_bounds_of_their_own(
    width: int, height: int, num_frames: int, bounds: tuple[int, int]
) -> None:
    config = video_config(*bounds)
    try:
        expected = reference_resize(height, width, 28, *bounds)
    except ValueError:
        with pytest.raises(InvalidRequestError, match="200"):
            video_grid(num_frames, width, height, config)
        return
    assert resize_frames(num_frames, width, height, config) == expected[::-1]
    steps, rows, columns = video_grid(num_frames, width, height, config)
    assert (steps, rows * 14, columns * 14) == (math.ceil(num_frames / 2), *expected)


def test_frames_may_share_a_number_of_tokens() -> None:
    """Of 1000 tokens nine tenths, 705,600 pixels: half of it for each of 4 frames, and never less than the least."""
    config = video_config(100352, 602112, max_tokens=1000)
    for num_frames, most in ((2, 602112), (4, 352800), (5, 282240), (1000, 105369)):
        expected = reference_resize(1080, 1920, 28, 100352, most)
        assert resize_frames(num_frames, 1920, 1080, config) == expected[::-1]


@given(
    SIDE,
    SIDE,
    st.sampled_from([1, 16, 256, 500]),
    st.integers(1, 8),
    st.sampled_from([1.0, 1.2, 2.0]),
)
@example(256, 307, 256, 4, 1.2)
@example(600, 1500, 256, 4, 1.2)
@example(5, 7, 1, 8, 1.0)
def test_gemma_crops_equal_the_reference(width: int, height: int, smallest: int, most: int, ratio: float) -> None:
    image = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (3, height, width))  # without memory of its own
    expected = Gemma3ImageProcessorPil().pan_and_scan(image, smallest, most, ratio)
    pan = PanAndScan(min_crop_size=smallest, max_crops=most, min_ratio=ratio)
    boxes = crop_boxes(width, height, pan)
    assert [image[:, top:bottom, left:right].shape for left, top, right, bottom in boxes] == [
        crop.shape for crop in expected
    ]


def test_gemma_crops_lie_side_by_side() -> None:
    pan = PanAndScan(min_crop_size=256, max_crops=4, min_ratio=1.2)
    assert crop_boxes(1001, 300, pan) == [(0, 0, 334, 300), (334, 0, 668, 300), (668, 0, 1001, 300)]
    assert crop_boxes(300, 1001, pan) == [(0, 0, 300, 334), (0, 334, 300, 668), (0, 668, 300, 1001)]
    assert crop_boxes(300, 1001, None) == []
