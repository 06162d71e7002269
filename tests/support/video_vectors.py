"""What `transformers`' video processor of Qwen2-VL makes of some videos: the cases, and where its results are kept.

That processor needs torchvision, which these tests do without: `tests/golden/make_video_vectors.py` makes the
vectors where it is installed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from video_frames import Frames, draw_frames

VECTORS = Path(__file__).parent.parent / "golden" / "video_vectors.npz"
# A frame is made to have between 16 x 16 and 64 x 64 pixels.
SMALL: dict[str, Any] = {"patch_size": 4, "min_pixels": 16 * 16, "max_pixels": 64 * 64}


@dataclass(frozen=True)
class VideoCase:
    size: tuple[int, int, int]  # frames, width, height
    settings: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    every: int = 1  # only each so manieth row of the result is kept

    @property
    def frames(self) -> Frames:
        return draw_frames(*self.size, seed=self.size[1])


CASES = {
    "as it is": VideoCase((4, 48, 40)),
    "smaller": VideoCase((4, 121, 90), every=3),
    "larger": VideoCase((2, 13, 9)),
    "nearly": VideoCase((4, 50, 37), every=2),
    "odd": VideoCase((5, 60, 44), every=5),
    "one": VideoCase((1, 44, 60)),
    "long": VideoCase((3, 200, 9)),
    "high": VideoCase((2, 7, 90)),
    "patch of 14": VideoCase((3, 100, 75), {"min_pixels": 56 * 56, "max_pixels": 84 * 84}, every=3),
    # The processor's own bounds. They are said, since some versions take over those of the last one that was made.
    "large": VideoCase((4, 160, 120), {"size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}}, 61),
    "other colours": VideoCase(
        (2, 33, 31), {**SMALL, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2], "rescale_factor": 1 / 127}
    ),
}
# Frames a second, for videos of 4 frames: the seconds between two of the patches that `transformers` counts from it.
RATES = (0.7, 1.0, 2.0, 3.0, 12.5, 24.0)


@dataclass(frozen=True)
class VideoVector:
    grid: tuple[int, int, int]
    num_rows: int
    rows: NDArray[np.float32]  # each `every`th


def load_vectors() -> dict[str, VideoVector]:
    with np.load(VECTORS) as stored:
        return {
            name: VideoVector(tuple(stored[f"{name}/grid"].tolist()), int(stored[f"{name}/num_rows"]), stored[name])
            for name in CASES
        }


def load_seconds_per_grid() -> dict[float, float]:
    """By rate."""
    with np.load(VECTORS) as stored:
        return dict(zip(RATES, map(float, stored["seconds_per_grid"]), strict=True))


def load_origin() -> dict[str, str]:
    """Which versions made the vectors."""
    with np.load(VECTORS) as stored:
        origin: dict[str, str] = json.loads(str(stored["origin"]))
        return origin
