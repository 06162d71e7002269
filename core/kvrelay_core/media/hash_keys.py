"""What media add to the hash chain of a prompt: the same picture in the same place hits, another one never does.

Placeholder tokens are the same for all pictures, so the tokens of a unit do not tell them apart. Every unit that a
media item reaches into therefore has an extra key: the content of the item, how it was cut into tokens, where it begins
relative to the unit, and how far apart in time a video's tokens stand. Knows nothing of tokens, nor of the model; the
root of the chain binds that.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvrelay_core.request import MediaReference

_ENTRY = struct.Struct("<q5I")  # behind the content hash; signed, since most units begin behind the item's offset
_VIDEO = 0xFFFF_FFFF  # where an image has its first row, of which a video has none but 0
_SECONDS = struct.Struct("<d")  # behind that of a video


def media_keys(media: Sequence[MediaReference], unit_tokens: int) -> tuple[bytes, ...]:
    """The `extra_keys` of `hash_units`: entry i is that of unit i, empty where no item reaches into it.

    As many as there are units up to the last item's end, a last one that is not full included. `media` in the order of
    their offsets, as `check_references` demands.
    """
    if not media:
        return ()
    last = media[-1]
    keys = [b""] * (-(-(last.offset + last.num_tokens) // unit_tokens))
    for item in media:
        end = item.offset + item.num_tokens
        for unit in range(item.offset // unit_tokens, -(-end // unit_tokens)):
            keys[unit] += item.content_hash + _entry(item, item.offset - unit * unit_tokens)
    return tuple(keys)


def _entry(item: MediaReference, offset: int) -> bytes:
    """No entry is the beginning of another one, so that several in a row are read in one way only."""
    if not item.seconds_per_grid:
        return _ENTRY.pack(offset, item.num_tokens, item.first_row, *item.grid)
    return _ENTRY.pack(offset, item.num_tokens, _VIDEO, *item.grid) + _SECONDS.pack(item.seconds_per_grid)
