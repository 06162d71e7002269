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
