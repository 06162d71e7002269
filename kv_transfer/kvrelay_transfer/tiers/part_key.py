"""What a tier calls the things that it keeps.

A record - the KV of some consecutive tokens, or the embedding of one image - is kept in parts of about 4 MiB. A part's
key names the content (`digest`, a hash chain's or an image's), everything else that its bytes depend on (`namespace`:
model, dtype, shape, rank, codec), and which part it is.

With a secret, keys are keyed hashes: who can read the tier cannot tell from a prompt whether it is in there. Knows no
tiers and no layouts.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from blake3 import blake3

NAMESPACE_BYTES = 16
DIGEST_BYTES = 32
PREFIX = "kvr1"  # of every key, so that one database may serve others too


class PartKey(NamedTuple):
    namespace: bytes
    digest: bytes
    part: int

    @property
    def text(self) -> str:
        """Printable, the same on every machine: kvr1:<namespace>:<digest>:<part>."""
        return f"{PREFIX}:{self.namespace.hex()}:{self.digest.hex()}:{self.part}"


def parse_key(text: str) -> PartKey | None:
    """None for what is not the text of a key."""
    try:
        prefix, namespace, digest, part = text.split(":")
        key = PartKey(bytes.fromhex(namespace), bytes.fromhex(digest), int(part))
    except ValueError:
        return None
    is_key = prefix == PREFIX and len(key.namespace) == NAMESPACE_BYTES and len(key.digest) == DIGEST_BYTES
    return key if is_key and key.part >= 0 and key.text == text else None


class KeyMaker:
    """Keys of one namespace. `secret` is 32 bytes, or nothing."""

    def __init__(self, fields: tuple[bytes, ...], secret: bytes = b"") -> None:
        """`fields` are what the bytes of a part depend on, apart from the content; their order matters."""
        self._secret = secret
        packed = b"".join(struct.pack("<I", len(field)) + field for field in fields)
        self.namespace = self._hash(b"kvrelay.tier.namespace" + packed)[:NAMESPACE_BYTES]

    def key(self, content_hash: bytes, part: int) -> PartKey:
        """`content_hash` of any length."""
        return PartKey(self.namespace, self._hash(self.namespace + content_hash), part)

    def _hash(self, data: bytes) -> bytes:
        return blake3(data, key=self._secret).digest() if self._secret else blake3(data).digest()
