"""Resizing and scaling of pixels to what a tower was trained on: (value x factor - mean) / deviation of each colour.

A pixel has one of 256 values, so that the results are a table, computed once as transformers computes each pixel
(the product in float64, rounded to float32) and equal to it bit by bit.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvrelay_core.errors import ConfigError
from kvrelay_core.media.processor_config import PixelConfig


class PixelScaler:
    def __init__(self, config: PixelConfig) -> None:
        """Raises ConfigError for a filter that Pillow does not have, or a deviation of 0."""
        values_V = (torch.arange(256, dtype=torch.float64) * config.rescale_factor).float()
        means_C1, deviations_C1 = (torch.tensor(row).unsqueeze(1) for row in (config.mean, config.std))
        self._table_CV = (values_V - means_C1) / deviations_C1
        if not self._table_CV.isfinite().all():
            raise ConfigError(f"the image processor's image_std must not hold 0: {config.std}")
        self._filter = _find_filter(config.resample)

    def __call__(self, image: Image.Image, width: int, height: int) -> Tensor:
        """float32 [3, height, width] of a picture in mode RGB and of any size."""
        resized = image.resize((width, height), resample=self._filter)
        pixels_CN = torch.from_numpy(np.array(resized)).view(width * height, -1).t()
        planes = [table.index_select(0, plane.int()) for table, plane in zip(self._table_CV, pixels_CN, strict=True)]
        return torch.stack(planes).view(-1, height, width)


def _find_filter(number: int) -> Image.Resampling:
    try:
        return Image.Resampling(number)
    except ValueError as error:
        known = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in Image.Resampling)
        raise ConfigError(
            f"the image processor's resample {number} is not a filter of Pillow; known are {known}"
        ) from error
