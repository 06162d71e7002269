"""Frames of videos for tests, the same on every machine and with every version of every library.

They are made by arithmetic on integers alone, so that vectors which were made of them elsewhere stay true.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Frames = NDArray[np.uint8]  # [frames, height, width, 3]


def draw_frames(num_frames: int, width: int, height: int, seed: int = 0) -> Frames:
    """Noise over slopes that move: all frequencies, and no two frames or places alike."""
    t, y, x, c = np.meshgrid(
        *(np.arange(size, dtype=np.uint32) for size in (num_frames, height, width, 3)), indexing="ij"
    )
    mixed: NDArray[Any] = x * 73_856_093 ^ y * 19_349_663 ^ (t + 31 * seed + 1) * 83_492_791 ^ c * 2_654_435_761
    mixed = (mixed ^ mixed >> 13) * 1_274_126_177
    noise = (mixed ^ mixed >> 16) & 63
    slope = (x * 160 // max(width, 1) + y * 90 // max(height, 1) + 23 * t + 40 * c) % 192
    return np.asarray(slope + noise, dtype=np.uint8)


def encode_frames(frames: Frames) -> list[bytes]:
    """Each as a PNG file: nothing is lost."""
    return [encode_frame(Image.fromarray(frame)) for frame in frames]


def encode_frame(frame: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = BytesIO()
    frame.save(buffer, file_format)
    return buffer.getvalue()
