"""What a checkpoint says about how images and videos are made into the model's input, from configuration files alone.

Written by transformers 4 and 5 under several names: `processor_config.json` may hold the settings itself, else those of
images are in `preprocessor_config.json`, and those of videos in `video_preprocessor_config.json`; where that is missing
the former hold for videos, too. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from kvrelay_core.checkpoint import read_json
from kvrelay_core.errors import ConfigError

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_BILINEAR, _BICUBIC = 2, 3

Rgb = tuple[float, float, float]


class PixelConfig(Struct, frozen=True, kw_only=True):
    """From pixels of 0 to 255 to what the tower takes: `(pixel * rescale_factor - mean) / std`, by channel."""

    resample: int  # Pillow's number of the filter
    rescale_factor: float
    mean: Rgb
    std: Rgb


class QwenVideoConfig(Struct, frozen=True, kw_only=True):
    pixels: PixelConfig
    min_pixels: int  # of a frame
    max_pixels: int
    max_tokens: int | None  # that bound a frame's pixels by the number of frames; None: nothing does
    token_id: int


class QwenProcessorConfig(Struct, frozen=True, kw_only=True):
    pixels: PixelConfig
    patch_size: int  # pixels of its side
    temporal_patch_size: int  # frames in a patch
    merge_size: int  # patches of a token's side
    min_pixels: int
    max_pixels: int
    image_token_id: int
    tokens_per_second: float  # positions in time that make a second of video
    video: QwenVideoConfig | None = None  # None: it takes images only


class PanAndScan(Struct, frozen=True, kw_only=True):
    min_crop_size: int  # pixels
    max_crops: int
    min_ratio: float  # of the longer to the shorter side, from which on an image is cropped


class GemmaProcessorConfig(Struct, frozen=True, kw_only=True):
    pixels: PixelConfig
    width: int  # pixels that every view is squeezed into
    height: int
    view_tokens: int
    pan_and_scan: PanAndScan | None
    begin_token_id: int
    image_token_id: int
    end_token_id: int


ProcessorConfig = QwenProcessorConfig | GemmaProcessorConfig


class _Settings(Struct, frozen=True):
    """What the files say, as plain data."""

    config: dict[str, Any]
    processor: dict[str, Any]
    image: dict[str, Any]
    video: dict[str, Any]  # empty where nothing is said of videos


def read_processor_config(folder: Path) -> ProcessorConfig | None:
    """None for a model that takes no images, for none that this release knows, and for one whose folder says nothing
    about images. Raises ConfigError for settings that cannot be followed."""
    config = read_json(folder / "config.json")
    read = _FAMILIES.get(config.get("model_type", ""))
    if read is None:
        return None
    processor = read_json(folder / "processor_config.json")
    beside = read_json(folder / "preprocessor_config.json")
    image = processor.get("image_processor") or beside
    if not image:
        return None
    video = processor.get("video_processor") or read_json(folder / "video_preprocessor_config.json") or beside
    try:
        return read(_Settings(config, processor, image, video))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: the image processor's settings are incomplete or malformed: {error!r}") from error
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error.message}") from error


def _check_followed(settings: dict[str, Any]) -> None:
    for flag in ("do_resize", "do_rescale", "do_normalize"):
        if settings.get(flag) is False:
            raise ConfigError(f"{flag} is false; only processors that do it are served")


def _read_qwen(settings: _Settings) -> QwenProcessorConfig:
    config, image = settings.config, settings.image
    _check_followed(image)
    min_pixels, max_pixels = _bounds(image, 56 * 56, 28 * 28 * 1280)
    processor = QwenProcessorConfig(
        pixels=_pixels(image, _BICUBIC, _CLIP_MEAN, _CLIP_STD),
        patch_size=_count(image.get("patch_size", 14)),
        temporal_patch_size=_count(image.get("temporal_patch_size", 2)),
        merge_size=_count(image.get("merge_size", 2)),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        image_token_id=int(config["image_token_id"]),
        tokens_per_second=float(_given(config.get("vision_config") or {}, "tokens_per_second", 4)),
    )
    if not settings.video or config.get("video_token_id") is None:
        return processor
    return structs.replace(processor, video=_read_qwen_video(settings.video, processor, int(config["video_token_id"])))


def _read_qwen_video(video: dict[str, Any], images: QwenProcessorConfig, token_id: int) -> QwenVideoConfig:
    """Of a video processor, or of the image processor that stands for one where there is none."""
    _check_followed(video)
    for name, default in (("patch_size", 14), ("temporal_patch_size", 2), ("merge_size", 2)):
        if video.get(name, default) != getattr(images, name):
            raise ConfigError(
                f"{name} is {video.get(name, default)} for videos and {getattr(images, name)} for images; only models "
                "with one tower for both are served"
            )
    min_pixels, max_pixels = _bounds(video, 128 * 28 * 28, 28 * 28 * 768)
    is_capped = bool(video.get("cap_pixels_per_frame"))
    return QwenVideoConfig(
        pixels=_pixels(video, _BICUBIC, _CLIP_MEAN, _CLIP_STD),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_tokens=_count(_given(video, "max_video_tokens", 128_000)) if is_capped else None,
        token_id=token_id,
    )


def _bounds(settings: dict[str, Any], smallest: int, largest: int) -> tuple[int, int]:
    """Pixels, at least and at most."""
    size = settings.get("size") or {}
    return (
        _count(_given(settings, "min_pixels", size.get("shortest_edge", smallest))),
        _count(_given(settings, "max_pixels", size.get("longest_edge", largest))),
    )


def _read_gemma(settings: _Settings) -> GemmaProcessorConfig:
    config, processor, image = settings.config, settings.processor, settings.image
    _check_followed(image)
    size = image.get("size") or {"height": 224, "width": 224}
    pan = None
    if image.get("do_pan_and_scan"):
        pan = PanAndScan(
            min_crop_size=_count(_given(image, "pan_and_scan_min_crop_size", 256)),
            max_crops=_count(_given(image, "pan_and_scan_max_num_crops", 4)),
            min_ratio=float(_given(image, "pan_and_scan_min_ratio_to_activate", 1.2)),
        )
    view_tokens = _given(processor, "image_seq_length", _given(config, "mm_tokens_per_image", 256))
    return GemmaProcessorConfig(
        pixels=_pixels(image, _BILINEAR, _HALF, _HALF),
        width=_count(size["width"]),
        height=_count(size["height"]),
        view_tokens=_count(view_tokens),
        pan_and_scan=pan,
        begin_token_id=int(_first(config, "boi_token_index", "boi_token_id", default=255_999)),
        image_token_id=int(_first(config, "image_token_index", "image_token_id", default=262_144)),
        end_token_id=int(_first(config, "eoi_token_index", "eoi_token_id", default=256_000)),
    )


_FAMILIES: dict[str, Callable[[_Settings], ProcessorConfig]] = {
    "qwen2_5_vl": _read_qwen,
    "gemma3": _read_gemma,
}


def _pixels(image: dict[str, Any], resample: int, mean: Rgb, std: Rgb) -> PixelConfig:
    return PixelConfig(
        resample=int(_given(image, "resample", resample)),
        rescale_factor=float(_given(image, "rescale_factor", 1 / 255)),
        mean=_rgb(_given(image, "image_mean", mean)),
        std=_rgb(_given(image, "image_std", std)),
    )


def _given(settings: dict[str, Any], name: str, default: Any) -> Any:
    """Null stands for the default, too."""
    value = settings.get(name)
    return default if value is None else value


def _first(settings: dict[str, Any], *names: str, default: Any) -> Any:
    return next((settings[name] for name in names if settings.get(name) is not None), default)


def _rgb(values: Any) -> Rgb:
    red, green, blue = map(float, values)
    return red, green, blue


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} must be a whole number of 1 or more")
    return value
