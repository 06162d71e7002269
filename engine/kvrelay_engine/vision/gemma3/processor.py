"""Gemma 3's processor: the whole picture squeezed into a square, and with pan-and-scan also crops of a long one."""

from __future__ import annotations

import torch

from kvrelay_core.errors import ConfigError, UnsupportedError
from kvrelay_core.media.gemma_vision import crop_boxes, num_views
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.processor_config import GemmaProcessorConfig, ProcessorConfig
from kvrelay_core.media.video import MediaContent, VideoFrames
from kvrelay_engine.vision.gemma3.config import GemmaVisionConfig
from kvrelay_engine.vision.image_decoding import decode_image, decoding_bytes
from kvrelay_engine.vision.image_input import ImageInput
from kvrelay_engine.vision.pixels import PixelScaler

_NO_GRID = (0, 0, 0)  # every view is the same square


class GemmaImageProcessor:
    """`pixels` are views [n, 3, side, side]: the whole picture, then its crops along the longer side."""

    def __init__(self, config: GemmaProcessorConfig, patches_per_view: int, limits: MediaLimits) -> None:
        self._config = config
        self._patches_per_view = patches_per_view
        self._limits = limits
        self._scale_pixels = PixelScaler(config.pixels)

    def decoding_bytes(self, data: MediaContent) -> int:
        """See `ImageProcessor.decoding_bytes`."""
        header, num_bytes = decoding_bytes(_picture_of(data), self._limits)
        view_bytes = self._config.width * self._config.height * 3 * 4
        return num_bytes + 2 * view_bytes * num_views(header.width, header.height, self._config)

    def process(self, data: MediaContent) -> ImageInput:
        """See `ImageProcessor.process`."""
        config, image = self._config, decode_image(_picture_of(data), self._limits)
        crops = [image.crop(box) for box in crop_boxes(image.width, image.height, config.pan_and_scan)]
        views = [self._scale_pixels(view, config.width, config.height) for view in (image, *crops)]
        return ImageInput(
            torch.stack(views),
            _NO_GRID,
            num_patches=len(views) * self._patches_per_view,
            num_tokens=len(views) * config.view_tokens,
        )


def _picture_of(data: MediaContent) -> bytes:
    if isinstance(data, VideoFrames):
        raise UnsupportedError("media: Gemma 3 takes no videos; send frames as images", field="media")
    return data


def make_processor(processor: ProcessorConfig, tower: GemmaVisionConfig, limits: MediaLimits) -> GemmaImageProcessor:
    """Raises ConfigError where the two do not fit each other, or a crop could be empty."""
    assert isinstance(processor, GemmaProcessorConfig), "the family is the model_type's"
    if not processor.width == processor.height == tower.image_size:
        raise ConfigError(
            f"the image processor makes {processor.width} x {processor.height} pixels, the tower in config.json takes "
            f"{tower.image_size} x {tower.image_size}"
        )
    if processor.view_tokens != tower.tokens_per_view:
        raise ConfigError(
            f"image_seq_length of the processor is {processor.view_tokens}, mm_tokens_per_image of config.json "
            f"{tower.tokens_per_view}"
        )
    pan = processor.pan_and_scan
    if pan is not None and pan.min_crop_size < pan.max_crops:
        raise ConfigError(
            f"the image processor's pan_and_scan_min_crop_size {pan.min_crop_size} must be at least "
            f"pan_and_scan_max_num_crops {pan.max_crops}, or a crop could be empty"
        )
    return GemmaImageProcessor(processor, tower.patches_per_side**2, limits)
