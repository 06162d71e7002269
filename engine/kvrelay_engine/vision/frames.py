"""Resizing and scaling of a video's frames, as transformers does it by torchvision: not quite as it does pictures.

A frame is resized by torch on its bytes (bicubic, with the filter as wide as the shrinking asks for), which rounds
otherwise than Pillow; factor and deviation are one division. Of both the arithmetic is repeated here, so that the
results are equal bit by bit where torch's own kernel is.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kvrelay_core.errors import ConfigError
from kvrelay_core.media.processor_config import PixelConfig

_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


class FrameScaler:
    def __init__(self, config: PixelConfig) -> None:
        """Raises ConfigError for a filter that torch does not have, a factor or a deviation of 0."""
        if not (config.rescale_factor and all(config.std)):
            raise ConfigError(
                f"the video processor's rescale_factor {config.rescale_factor} and image_std {config.std} must not be 0"
            )
        inverse = 1.0 / config.rescale_factor
        self._means_C11, self._deviations_C11 = (
            torch.tensor(row).view(-1, 1, 1) * inverse for row in (config.mean, config.std)
        )
        self._mode = _find_mode(config.resample)

    def __call__(self, image: Image.Image, width: int, height: int) -> Tensor:
        """float32 [3, height, width] of a frame in mode RGB and of any size."""
        frame_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if image.size != (width, height):
            frame_CHW = F.interpolate(frame_CHW.unsqueeze(0), (height, width), mode=self._mode, antialias=True)[0]
        return frame_CHW.float().sub_(self._means_C11).div_(self._deviations_C11)


def _find_mode(number: int) -> str:
    mode = next((mode for filter, mode in _MODES.items() if filter == number), None)
    if mode is None:
        known = ", ".join(f"{filter.value} ({mode})" for filter, mode in _MODES.items())
        raise ConfigError(f"the video processor's resample {number} is not served; known are {known}")
    return mode
