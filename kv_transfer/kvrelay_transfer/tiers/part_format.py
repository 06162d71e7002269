"""A part as it lies in a tier that could lie: a header, and a body whose checksum the header has.

    magic 8 | version u16 | codec u16 | part u32 | num_parts u32 | raw_bytes u64 | body_bytes u64 | namespace 16 |
    digest 32 | checksum 32                                               = 116 bytes, little-endian, padded to 128

The checksum is the BLAKE3 hash of all header fields before it and of the body; with a secret it is keyed, and so a MAC
(https://github.com/BLAKE3-team/BLAKE3-specs). What does not fit what was asked for is no part: a miss, never an error.
"""

from __future__ import annotations

import hmac
import struct
from enum import Enum

from blake3 import blake3
from msgspec import Struct

from kvrelay_transfer.tiers.part_key import PartKey

HEADER_BYTES = 128
_MAGIC = b"KVRPART\0"
_VERSION = 1
_FIELDS = struct.Struct("<8sHHIIQQ16s32s")
_CHECKSUM_BYTES = 32
_PADDING = b"\0" * (HEADER_BYTES - _FIELDS.size - _CHECKSUM_BYTES)


class BadPart(Enum):
    """Why bytes are not the part that was asked for."""

    TRUNCATED = "truncated"
    FOREIGN = "foreign"  # not ours, of another release, or another part
    DAMAGED = "damaged"  # or made by somebody without the secret


class PartHeader(Struct, frozen=True):
    key: PartKey
    num_parts: int  # of the record
    raw_bytes: int  # before the codec
    body_bytes: int  # as it lies there
    codec: int = 0


def seal_part(header: PartHeader, part: memoryview, secret: bytes = b"") -> None:
    """Writes the header in front of the body: `part` is HEADER_BYTES + header.body_bytes long, its body is there."""
    assert len(part) == HEADER_BYTES + header.body_bytes
    fields = _FIELDS.pack(
        _MAGIC, _VERSION, header.codec, header.key.part, header.num_parts, header.raw_bytes, header.body_bytes,
        header.key.namespace, header.key.digest,
    )  # fmt: skip
    part[:HEADER_BYTES] = fields + _checksum(fields, part[HEADER_BYTES:], secret) + _PADDING


def read_header(part: memoryview) -> PartHeader | BadPart:
    """What the header says, unverified."""
    if len(part) < HEADER_BYTES:
        return BadPart.TRUNCATED
    magic, version, codec, number, num_parts, raw_bytes, body_bytes, namespace, digest = _FIELDS.unpack_from(part)
    if magic != _MAGIC or version != _VERSION:
        return BadPart.FOREIGN
    return PartHeader(PartKey(namespace, digest, number), num_parts, raw_bytes, body_bytes, codec)


def open_part(key: PartKey, part: memoryview, secret: bytes = b"") -> PartHeader | BadPart:
    """The header, if `part` is whole, unharmed and what `key` names. The body is part[HEADER_BYTES:]."""
    header = read_header(part)
    if isinstance(header, BadPart):
        return header
    if header.key != key:
        return BadPart.FOREIGN
    if len(part) != HEADER_BYTES + header.body_bytes:
        return BadPart.TRUNCATED
    fields, found = bytes(part[: _FIELDS.size]), bytes(part[_FIELDS.size : _FIELDS.size + _CHECKSUM_BYTES])
    if not hmac.compare_digest(found, _checksum(fields, part[HEADER_BYTES:], secret)):
        return BadPart.DAMAGED
    return header


def _checksum(fields: bytes, body: memoryview, secret: bytes) -> bytes:
    hasher = blake3(fields, key=secret) if secret else blake3(fields)
    return hasher.update(body).digest()
