"""Settings are read as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kvrelay_core.errors import ConfigError
from kvrelay_core.media.processor_config import (
    GemmaProcessorConfig,
    PanAndScan,
    QwenProcessorConfig,
    QwenVideoConfig,
    read_processor_config,
)

QWEN: dict[str, Any] = {"model_type": "qwen2_5_vl", "image_token_id": 7}
GEMMA: dict[str, Any] = {"model_type": "gemma3", "boi_token_index": 4, "image_token_index": 5, "eoi_token_index": 6}


def write(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_qwen_as_transformers_writes_it(tmp_path: Path) -> None:
    processor = Qwen2VLImageProcessorPil(min_pixels=100, max_pixels=5000, patch_size=16)
    processor.save_pretrained(write(tmp_path, QWEN))
    config = read_processor_config(tmp_path)
    assert isinstance(config, QwenProcessorConfig)
    assert (config.min_pixels, config.max_pixels, config.patch_size, config.merge_size) == (100, 5000, 16, 2)
    assert (config.temporal_patch_size, config.image_token_id) == (2, 7)
    pixels = config.pixels
    assert (pixels.resample, pixels.rescale_factor) == (int(processor.resample), processor.rescale_factor)
    assert (list(pixels.mean), list(pixels.std)) == (list(processor.image_mean), list(processor.image_std))


def test_qwen_as_older_checkpoints_have_it(tmp_path: Path) -> None:
    write(tmp_path, QWEN, preprocessor_config={"min_pixels": 3136, "max_pixels": 12845056, "merge_size": 2})
    config = read_processor_config(tmp_path)
    assert isinstance(config, QwenProcessorConfig)
    assert (config.min_pixels, config.max_pixels, config.patch_size) == (3136, 12845056, 14)


def test_gemma_as_transformers_writes_it(tmp_path: Path) -> None:
    Gemma3ImageProcessorPil(size={"height": 896, "width": 896}).save_pretrained(write(tmp_path, GEMMA))
    config = read_processor_config(tmp_path)
    assert isinstance(config, GemmaProcessorConfig)
    assert (config.width, config.height, config.view_tokens, config.pan_and_scan) == (896, 896, 256, None)
    assert (config.begin_token_id, config.image_token_id, config.end_token_id) == (4, 5, 6)


def test_settings_within_the_processors_file_win(tmp_path: Path) -> None:
    image = {"do_pan_and_scan": True, "pan_and_scan_max_num_crops": 3, "pan_and_scan_min_crop_size": None}
    write(
        tmp_path,
        {**GEMMA, "mm_tokens_per_image": 64},
        processor_config={"image_seq_length": 16, "image_processor": image},
        preprocessor_config={"do_pan_and_scan": False},
    )
    config = read_processor_config(tmp_path)
    assert isinstance(config, GemmaProcessorConfig)
    assert config.pan_and_scan == PanAndScan(min_crop_size=256, max_crops=3, min_ratio=1.2)
    assert config.view_tokens == 16


SMALL_VIDEO = {"size": {"shortest_edge": 300, "longest_edge": 6000}, "image_std": [0.5, 0.5, 0.5]}


def video_of(folder: Path) -> QwenVideoConfig | None:
    config = read_processor_config(folder)
    assert isinstance(config, QwenProcessorConfig)
    return config.video


def test_videos_settings_are_where_transformers_looks_for_them(tmp_path: Path) -> None:
    """In the processor's file, in one of their own, or else they are those of images."""
    write(tmp_path, {**QWEN, "video_token_id": 8}, preprocessor_config={"min_pixels": 3136, "max_pixels": 12845056})
    video = video_of(tmp_path)
    assert video is not None
    assert (video.token_id, video.min_pixels, video.max_pixels, video.max_tokens) == (8, 3136, 12845056, None)
    write(tmp_path, {**QWEN, "video_token_id": 8}, video_preprocessor_config={"do_sample_frames": True})
    video = video_of(tmp_path)
    assert video is not None
    assert (video.min_pixels, video.max_pixels) == (128 * 28 * 28, 768 * 28 * 28)
    write(
        tmp_path,
        {**QWEN, "video_token_id": 8},
        processor_config={"video_processor": {**SMALL_VIDEO, "cap_pixels_per_frame": True, "max_video_tokens": 99}},
    )
    video = video_of(tmp_path)
    assert video is not None
    assert (video.min_pixels, video.max_pixels, video.max_tokens) == (300, 6000, 99)
    assert video.pixels.std == (0.5, 0.5, 0.5)


def test_a_model_whose_files_do_not_name_videos_takes_none(tmp_path: Path) -> None:
    write(tmp_path, QWEN, preprocessor_config={"min_pixels": 3136})
    assert video_of(tmp_path) is None, "no token"
    images = tmp_path / "images only"
    images.mkdir()
    write(images, {**QWEN, "video_token_id": 8}, processor_config={"image_processor": {"min_pixels": 3136}})
    assert video_of(images) is None, "no settings"


def test_the_pace_of_time_is_that_of_the_config(tmp_path: Path) -> None:
    for vision, expected in (({"tokens_per_second": 2}, 2.0), ({}, 4.0)):
        write(tmp_path, {**QWEN, "vision_config": vision}, preprocessor_config={"min_pixels": 3136})
        config = read_processor_config(tmp_path)
        assert isinstance(config, QwenProcessorConfig)
        assert config.tokens_per_second == expected


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"patch_size": 16}, "patch_size is 16 for videos and 14 for images"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"min_pixels": 0}, "1 or more"),
    ],
)
def test_settings_of_videos_that_cannot_be_followed_are_refused(
    tmp_path: Path, video: dict[str, Any], message: str
) -> None:
    write(
        tmp_path, {**QWEN, "video_token_id": 8}, preprocessor_config={"min_pixels": 9}, video_preprocessor_config=video
    )
    with pytest.raises(ConfigError, match=message):
        read_processor_config(tmp_path)


def test_a_text_model_has_none(tmp_path: Path) -> None:
    assert read_processor_config(write(tmp_path, {"model_type": "llama"})) is None
    assert read_processor_config(tmp_path / "nowhere") is None
    assert read_processor_config(write(tmp_path, QWEN)) is None, "it does not say how images are processed"


@pytest.mark.parametrize(
    ("config", "image", "message"),
    [
        (QWEN, {"do_resize": False}, "do_resize"),
        (QWEN, {"patch_size": 0}, "1 or more"),
        (QWEN, {"patch_size": "14"}, "1 or more"),
        (QWEN, {"image_mean": [1, 2]}, "malformed"),
        ({"model_type": "qwen2_5_vl"}, {"patch_size": 14}, "image_token_id"),
        (GEMMA, {"size": {"height": 8}}, "width"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, config: dict[str, Any], image: dict[str, Any], message: str
) -> None:
    write(tmp_path, config, preprocessor_config=image)
    with pytest.raises(ConfigError, match=message):
        read_processor_config(tmp_path)
