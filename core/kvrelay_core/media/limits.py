"""How much media requests may bring, so that the memory that they take is bounded before anything is decoded."""

from __future__ import annotations

from msgspec import Struct

from kvrelay_core.errors import ConfigError

# Beyond it Pillow itself takes an image for an attack.
MOST_PIXELS = 89_478_485


class MediaLimits(Struct, frozen=True, kw_only=True):
    max_items: int = 32  # of a request
    max_item_bytes: int = 20 << 20  # as received, decoded from base64
    max_pixels: int = 50_000_000  # of an image, before it is made smaller
    max_bytes_in_progress: int = 1 << 30  # of all requests of a router, as received: they are kept till the end

    def validate(self) -> None:
        """Raises ConfigError."""
        if min(self.max_items, self.max_item_bytes, self.max_pixels, self.max_bytes_in_progress) < 1:
            raise ConfigError("media limits must be 1 or more")
        if self.max_pixels > MOST_PIXELS:
            raise ConfigError(f"max_pixels is {self.max_pixels}; allowed: up to {MOST_PIXELS}")
