"""Videos as this system takes them: frames that somebody has sampled, each an image's file, and their rate.

No container is opened anywhere: a decoder of videos is a large dependency of its own that would meet strangers' bytes.
"""

from __future__ import annotations

from msgspec import Struct


class VideoFrames(Struct, frozen=True):
    frames: tuple[bytes, ...]  # in order of time, as received
    fps: float  # how many of them make a second


MediaContent = bytes | VideoFrames  # an image's file, or a video


def count_bytes(content: MediaContent) -> int:
    """As received."""
    return sum(map(len, content.frames)) if isinstance(content, VideoFrames) else len(content)
