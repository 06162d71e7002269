"""The one hash chain over token blocks that router, workers and tiers share.

A chain hashes full units of `unit_tokens` tokens: `BLAKE3(parent || token ids as little-endian u32 || extra)`.
Its root binds the model (a content hash, never a path), the adapter and the tenant's salt, so that equal
tokens under another model or tenant never collide.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from blake3 import blake3

HASH_BYTES = 32


def _field(data: bytes) -> bytes:
    """Length-prefixed, so that no two field lists have the same encoding."""
    return struct.pack("<I", len(data)) + data


def root_hash(model_fingerprint: bytes, adapter_fingerprint: bytes = b"", cache_salt: str = "") -> bytes:
    fields = (b"kvrelay.v1", model_fingerprint, adapter_fingerprint, cache_salt.encode())
    return blake3(b"".join(map(_field, fields))).digest()


def hash_units(
    root: bytes, token_ids: Sequence[int], unit_tokens: int, extra_keys: Sequence[bytes] = ()
) -> list[bytes]:
    """Chained hashes of the full units of `token_ids`.

    `extra_keys[i]`, where given, is the canonical encoding of what else unit i depends on (media hash and
    offset); units beyond its length have none.
    """
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    unit_bytes = 4 * unit_tokens
    hashes: list[bytes] = []
    parent = root
    for unit in range(len(token_ids) // unit_tokens):
        extra = extra_keys[unit] if unit < len(extra_keys) else b""
        parent = blake3(parent + packed[unit * unit_bytes : (unit + 1) * unit_bytes] + extra).digest()
        hashes.append(parent)
    return hashes
