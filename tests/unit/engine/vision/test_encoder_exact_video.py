"""Videos are prepared as transformers' own video processor prepares them, and what they are made of matters.

That processor needs torchvision, so what it makes was kept, from where it runs: see `tests/golden`. That the tower does
with several frames what transformers' does is shown beside its pictures, in `test_encoder_exact_qwen2_5_vl.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from video_frames import Frames, draw_frames, encode_frames
from video_vectors import CASES, VideoCase, VideoVector, load_seconds_per_grid, load_vectors
from vision_checkpoints import make_gemma3, make_qwen2_5_vl
from vision_rig import difference

from kvrelay_core.errors import ConfigError, InvalidRequestError, UnsupportedError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.processor_config import PixelConfig, QwenProcessorConfig, read_processor_config
from kvrelay_core.media.qwen_vision import num_tokens, seconds_per_grid, video_grid
from kvrelay_core.media.video import VideoFrames
from kvrelay_engine.vision.frames import FrameScaler
from kvrelay_engine.vision.loader import LoadedTower, load_tower
from kvrelay_engine.vision.qwen2_5_vl.processor import QwenImageProcessor

IDS = {"model_type": "qwen2_5_vl", "image_token_id": 1, "video_token_id": 2}


@pytest.fixture(scope="module")
def vectors() -> dict[str, VideoVector]:
    return load_vectors()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedTower:
    torch.set_num_threads(1)
    return load_tower(str(make_qwen2_5_vl(tmp_path_factory.mktemp("video") / "qwen2_5_vl")), "float32", "cpu")


def config_of(case: VideoCase, folder: Path) -> QwenProcessorConfig:
    """As it is read from a checkpoint with the case's settings."""
    images = {name: value for name, value in case.settings.items() if name == "patch_size"}
    files = {"config": IDS, "preprocessor_config": {"merge_size": 2, **images}}
    for name, content in {**files, "video_preprocessor_config": {"merge_size": 2, **case.settings}}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    config = read_processor_config(folder)
    assert isinstance(config, QwenProcessorConfig)
    return config


def video_of(frames: Frames, fps: float = 2.0) -> VideoFrames:
    return VideoFrames(tuple(encode_frames(frames)), fps)


def embed(loaded: LoadedTower, video: VideoFrames) -> torch.Tensor:
    return loaded.tower.encode([loaded.processor.process(video)])[0]


# --------------------------------------------------------------------------------------------- as transformers


@pytest.mark.parametrize("name", CASES)
def test_encoder_exact_video_pixels(name: str, vectors: dict[str, VideoVector], tmp_path: Path) -> None:
    case, vector, config = CASES[name], vectors[name], config_of(CASES[name], tmp_path)
    found = QwenImageProcessor(config, MediaLimits()).process(video_of(case.frames))
    assert found.grid == vector.grid == video_grid(*case.size, config)
    assert len(found.pixels) == found.num_patches == vector.num_rows
    assert found.num_tokens == num_tokens(vector.grid, config)
    assert (found.pixels[:: case.every] - torch.from_numpy(vector.rows)).abs().max() <= 1e-6


def test_encoder_exact_video_time(tmp_path: Path) -> None:
    config = config_of(CASES["as it is"], tmp_path)
    for rate, seconds in load_seconds_per_grid().items():
        assert np.float32(seconds_per_grid(rate, config)) == np.float32(seconds)


# -------------------------------------------------------------------------------------- ways to the same answer


def test_the_last_frame_of_an_odd_number_counts_twice(loaded: LoadedTower) -> None:
    frames = draw_frames(3, 40, 32)
    odd, even = (video_of(part) for part in (frames, np.concatenate([frames, frames[-1:]])))
    assert torch.equal(embed(loaded, odd), embed(loaded, even))


def test_steps_in_time_know_nothing_of_each_other(loaded: LoadedTower) -> None:
    frames = draw_frames(6, 40, 32)
    whole = embed(loaded, video_of(frames))
    parts = torch.cat([embed(loaded, video_of(frames[at : at + 2])) for at in (0, 2, 4)])
    assert difference(whole, parts) <= 1e-6


def test_the_rate_is_no_part_of_the_embedding(loaded: LoadedTower) -> None:
    frames = draw_frames(2, 40, 32)
    assert torch.equal(embed(loaded, video_of(frames, 1.0)), embed(loaded, video_of(frames, 30.0)))


# -------------------------------------------------------------------------------------------- what must matter


def test_encoder_exact_video_frames_and_their_order_matter(loaded: LoadedTower) -> None:
    frames = draw_frames(4, 40, 32)
    before = embed(loaded, video_of(frames))
    for order in ([3, 2, 1, 0], [1, 0, 2, 3], [0, 1, 3, 2], [0, 1, 2, 2]):
        assert difference(embed(loaded, video_of(frames[order])), before) > 1e-2
    assert difference(embed(loaded, video_of(draw_frames(4, 40, 32, seed=1))), before) > 1e-2


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ((0, 0, 1), "frames of one size"),
        ((0, 2), "frame 1 of a video: the image cannot be decoded"),
        ((), "0 frames"),
    ],
)
def test_bad_frames_are_refused(frames: tuple[int, ...], message: str, loaded: LoadedTower) -> None:
    good, other = (encode_frames(draw_frames(1, *size))[0] for size in ((40, 32), (32, 40)))
    files = (good, other, good[:-200])
    with pytest.raises(InvalidRequestError, match=message):
        loaded.processor.process(VideoFrames(tuple(files[index] for index in frames), 2.0))


def test_a_model_that_takes_no_videos_says_so(tmp_path: Path) -> None:
    gemma = load_tower(str(make_gemma3(tmp_path / "gemma3")), "float32", "cpu")
    with pytest.raises(UnsupportedError, match="takes no videos"):
        gemma.processor.process(video_of(draw_frames(2, 40, 32)))


def test_settings_of_images_alone_are_none_of_videos(loaded: LoadedTower, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(IDS))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"patch_size": 4}}))
    config = read_processor_config(tmp_path)
    assert isinstance(config, QwenProcessorConfig)
    with pytest.raises(UnsupportedError, match="says nothing of videos"):
        QwenImageProcessor(config, MediaLimits()).process(video_of(draw_frames(2, 40, 32)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 1}, "resample 1 is not served"),
        ({"std": (0.0, 1.0, 1.0)}, "image_std .* must not be 0"),
        ({"rescale_factor": 0.0}, "rescale_factor 0.0 .* must not be 0"),
    ],
)
def test_settings_that_torch_cannot_follow_are_refused(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"resample": 3, "rescale_factor": 1 / 255, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ConfigError, match=message):
        FrameScaler(PixelConfig(**{**settings, **changes}))  # type: ignore[arg-type]
