"""Parts for tests of stores: whatever number says which, the same bytes every time."""

from __future__ import annotations

import random

from kvrelay_transfer.tiers.part_format import HEADER_BYTES, PartHeader, open_part, seal_part
from kvrelay_transfer.tiers.part_key import KeyMaker, PartKey

BODY_BYTES = 4000
PART_BYTES = HEADER_BYTES + BODY_BYTES
SECRET = bytes(range(32))


def key_of(number: int, model: bytes = b"model", part: int = 0) -> PartKey:
    return KeyMaker((b"kv", model)).key(number.to_bytes(8, "little"), part)


def sealed(key: PartKey, body: bytes, num_parts: int = 1, secret: bytes = b"") -> bytes:
    part = bytearray(HEADER_BYTES) + body
    seal_part(PartHeader(key, num_parts, len(body), len(body)), memoryview(part), secret)
    return bytes(part)


def part_of(key: PartKey, body_bytes: int = BODY_BYTES) -> bytes:
    """Its body depends on the key."""
    return sealed(key, random.Random(key.text).randbytes(body_bytes))


def is_whole(key: PartKey, part: memoryview | bytes) -> bool:
    """What a tier asks before it uses a part, and that it is the one of `part_of`."""
    header = open_part(key, memoryview(part))
    return isinstance(header, PartHeader) and part_of(key, header.body_bytes) == part
