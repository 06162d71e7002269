"""The name of a media item's embedding: a hash of the bytes as the client sent them and of the encoder.

Nothing is decoded for it. It names the item in tickets, in caches and in the hash chain of the prompt, so that neither
an embedding nor KV that another tower or another processor made is ever taken for this one.
"""

from __future__ import annotations

from blake3 import blake3


def media_hash(data: bytes, encoder_fingerprint: bytes) -> bytes:
    """BLAKE3, 32 bytes. Two encodings of one picture are two items."""
    return blake3(blake3(encoder_fingerprint).digest() + blake3(data).digest()).digest()
