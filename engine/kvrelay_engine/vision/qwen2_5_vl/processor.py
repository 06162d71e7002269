"""Qwen2.5-VL's processor: a picture keeps its proportions; its sides become multiples of a merged patch.

So do the frames of a video, two of which make a patch. Of a video of an odd number the last frame counts twice.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from kvrelay_core.errors import ConfigError, InvalidRequestError, UnsupportedError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.processor_config import ProcessorConfig, QwenProcessorConfig
from kvrelay_core.media.qwen_vision import Grid, num_tokens, smart_resize, video_grid
from kvrelay_core.media.video import MediaContent, VideoFrames
from kvrelay_core.media.video_header import frame_error, read_video_header
from kvrelay_engine.vision.frames import FrameScaler
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
        self._scale_frame = None if config.video is None else FrameScaler(config.video.pixels)

    def decoding_bytes(self, data: MediaContent) -> int:
        """See `ImageProcessor.decoding_bytes`. Made patches and frames that are about to be some count each."""
        config = self._config
        if isinstance(data, VideoFrames):
            grid = self._grid_of(data)
            num_bytes = max(decoding_bytes(frame, self._limits)[1] for frame in data.frames)
            num_pixels = grid[1] * grid[2] * config.patch_size**2
            return num_bytes + num_pixels * _BYTES_PER_PIXEL * (grid[0] + 3) * config.temporal_patch_size
        header, num_bytes = decoding_bytes(data, self._limits)
        width, height = smart_resize(header.width, header.height, config)
        return num_bytes + width * height * _BYTES_PER_PIXEL * (1 + config.temporal_patch_size)

    def process(self, data: MediaContent) -> ImageInput:
        """See `ImageProcessor.process`."""
        return self._video(data) if isinstance(data, VideoFrames) else self._picture(data)

    def _picture(self, data: bytes) -> ImageInput:
        config, image = self._config, decode_image(data, self._limits)
        width, height = smart_resize(image.width, image.height, config)
        pixels_FCHW = self._scale_pixels(image, width, height).unsqueeze(0)
        still = pixels_FCHW.expand(config.temporal_patch_size, -1, -1, -1)
        return self._input(self._patches(still), (1, height // config.patch_size, width // config.patch_size))

    def _video(self, video: VideoFrames) -> ImageInput:
        """One step in time after the other: never are more frames decoded than make a patch."""
        config, grid, scale = self._config, self._grid_of(video), self._scale_frame
        assert scale is not None, "there is a grid"
        height, width = (patches * config.patch_size for patches in grid[1:])
        patches_TPI = torch.empty(grid[0], grid[1] * grid[2], 3 * config.temporal_patch_size * config.patch_size**2)
        for step, patches_PI in enumerate(patches_TPI):
            first = step * config.temporal_patch_size
            frames = [
                scale(self._decode(index, frame), width, height)
                for index, frame in enumerate(video.frames[first : first + config.temporal_patch_size], first)
            ]
            frames += frames[-1:] * (config.temporal_patch_size - len(frames))
            patches_PI.copy_(self._patches(torch.stack(frames)))
        return self._input(patches_TPI.flatten(0, 1), grid)

    def _grid_of(self, video: VideoFrames) -> Grid:
        if self._scale_frame is None:
            raise UnsupportedError(
                "media: this checkpoint says nothing of videos; send frames as images", field="media"
            )
        header = read_video_header(video, self._limits)
        return video_grid(len(video.frames), header.width, header.height, self._config)

    def _decode(self, index: int, frame: bytes) -> Image.Image:
        try:
            return decode_image(frame, self._limits)
        except InvalidRequestError as error:
            raise frame_error(index, error) from error

    def _patches(self, frames_FCHW: Tensor) -> Tensor:
        """[n, 3 x frames x side x side] of as many frames as a patch has."""
        patch, merge = self._config.patch_size, self._config.merge_size
        frames, _, height, width = frames_FCHW.shape
        rows, columns = height // patch, width // patch
        blocks = frames_FCHW.reshape(frames, 3, rows // merge, merge, patch, columns // merge, merge, patch)
        return blocks.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1)

    def _input(self, patches_NI: Tensor, grid: Grid) -> ImageInput:
        return ImageInput(patches_NI, grid, num_patches=len(patches_NI), num_tokens=num_tokens(grid, self._config))


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
