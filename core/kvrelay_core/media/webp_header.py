"""Size and metadata of a WebP image by its chunks: Pillow would allocate the whole canvas to open it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_CHUNK = struct.Struct("<4sI")
_FIRST_CHUNK = 12  # behind RIFF, the file's size and WEBP


def is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height. Raises ValueError for a malformed or truncated header."""
    for name, at, _ in _chunks(data):
        head = data[at : at + 10]
        if len(head) < 5:
            break
        if name == b"VP8L" and head[0] == 0x2F:
            bits = int.from_bytes(head[1:5], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if len(head) < 10:
            break
        if name == b"VP8X":
            return int.from_bytes(head[4:7], "little") + 1, int.from_bytes(head[7:10], "little") + 1
        if name == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
            width, height = struct.unpack("<HH", head[6:10])
            return width & 0x3FFF, height & 0x3FFF
        break
    raise ValueError("no image header")


def webp_exif(data: bytes) -> bytes:
    """The EXIF block; empty when there is none."""
    return next((data[at : at + size] for name, at, size in _chunks(data) if name == b"EXIF"), b"")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and size of each chunk's content, the last one perhaps cut off."""
    at = _FIRST_CHUNK
    while at + _CHUNK.size <= len(data):
        name, size = _CHUNK.unpack_from(data, at)
        yield name, at + _CHUNK.size, size
        at += _CHUNK.size + size + size % 2
