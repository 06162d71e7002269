"""Qwen2.5-VL's processor: a picture keeps its proportions; its sides become multiples of a merged patch."""

from __future__ import annotations

from kvrelay_core.errors import ConfigError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.processor_config import ProcessorConfig, QwenProcessorConfig
from kvrelay_core.media.qwen_vision import num_tokens, smart_resize
from kvrelay_engine.vision.image_decoding import decode_image, decoding_bytes
from kvrelay_engine.vision.image_input import ImageInput
from kvrelay_engine.vision.pixels import PixelScaler
from kvrelay_engine.vision.qwen2_5_vl.config import QwenVisionConfig

_BYTES_PER_PIXEL = 3 * 4  # float32


class QwenImageProcessor:
    """`pixels` are patches [n, 3 x frames x side x side], those that merge together; `grid` counts patches."""

    def __init__(self, config: QwenProcessorConfig, limits: MediaLimits) -> None:
        self._config = config
        self._limits = limits
        self._scale_pixels = PixelScaler(config.pixels)

    def decoding_bytes(self, data: bytes) -> int:
        """See `ImageProcessor.decoding_bytes`."""
        header, num_bytes = decoding_bytes(data, self._limits)
        width, height = smart_resize(header.width, header.height, self._config)
        return num_bytes + width * height * _BYTES_PER_PIXEL * (1 + self._config.temporal_patch_size)

    def process(self, data: bytes) -> ImageInput:
        """See `ImageProcessor.process`."""
        config, image = self._config, decode_image(data, self._limits)
        width, height = smart_resize(image.width, image.height, config)
        patch, merge = config.patch_size, config.merge_size
        rows, columns = height // patch, width // patch
        pixels = self._scale_pixels(image, width, height)
        blocks = pixels.view(3, rows // merge, merge, patch, columns // merge, merge, patch)
        patches = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        frames = patches.expand(-1, -1, -1, -1, -1, config.temporal_patch_size, -1, -1)  # a picture stands still
        grid = (1, rows, columns)
        return ImageInput(
            frames.reshape(rows * columns, -1), grid, num_patches=rows * columns, num_tokens=num_tokens(grid, config)
        )


def make_processor(processor: ProcessorConfig, tower: QwenVisionConfig, limits: MediaLimits) -> QwenImageProcessor:
    """Raises ConfigError where the two do not fit each other."""
    assert isinstance(processor, QwenProcessorConfig), "the family is the model_type's"
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        if getattr(processor, name) != getattr(tower, name):
            raise ConfigError(
                f"the image processor's {name} is {getattr(processor, name)}, that of the tower in config.json "
                f"{getattr(tower, name)}"
            )
    return QwenImageProcessor(processor, limits)
