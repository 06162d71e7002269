"""How much media requests may bring, so that the memory that they take is bounded before anything is decoded."""

from __future__ import annotations

from msgspec import Struct

from kvrelay_core.errors import ConfigError

# Beyond it Pillow itself takes an image for an attack.
MOST_PIXELS = 89_478_485


class MediaLimits(Struct, frozen=True, kw_only=True):
    max_items: int = 32  # of a request
    max_item_bytes: int = 20 << 20  # as received, decoded from base64; of all frames of a video
    max_pixels: int = 50_000_000  # of an image or a frame, before it is made smaller
    max_video_frames: int = 256
    max_video_pixels: int = 100_000_000  # of all its frames, before they are made smaller
    max_bytes_in_progress: int = 1 << 30  # of all requests of a router, as received: they are kept till the end

    def validate(self) -> None:
        """Raises ConfigError."""
        if min(getattr(self, name) for name in self.__struct_fields__) < 1:
            raise ConfigError("media limits must be 1 or more")
        if self.max_pixels > MOST_PIXELS:
            raise ConfigError(f"max_pixels is {self.max_pixels}; allowed: up to {MOST_PIXELS}")
