"""Puts the embeddings of media in the place of their placeholder tokens."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kvrelay_engine.runner import MediaRows


def place_media(media: Iterable[MediaRows], embeddings_NE: Tensor) -> None:
    """Overwrites rows of `embeddings_NE`, on whatever device and in whatever dtype the media are."""
    for item in media:
        embeddings_NE[item.first : item.first + len(item.rows)].copy_(item.rows)
