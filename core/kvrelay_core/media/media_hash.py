"""The name of a media item's embedding: a hash of the bytes as the client sent them and of the encoder.

Nothing is decoded for it. It names the item in tickets, in caches and in the hash chain of the prompt, so that neither
an embedding nor KV that another tower or another processor made is ever taken for this one. A video's rate is hashed
too: it is no part of the embedding, but of where its tokens stand.
"""

from __future__ import annotations

import struct

from blake3 import blake3

from kvrelay_core.media.video import MediaContent, VideoFrames

# Of its own, so that no image's bytes are those of a video.
_VIDEO_CONTEXT = "kvrelay v1 media item: video of frames"


def media_hash(content: MediaContent, encoder_fingerprint: bytes) -> bytes:
    """BLAKE3, 32 bytes. Two encodings of one picture are two items, and so are other frames, orders and rates."""
    return blake3(blake3(encoder_fingerprint).digest() + _digest(content)).digest()


def _digest(content: MediaContent) -> bytes:
    if not isinstance(content, VideoFrames):
        return blake3(content).digest()
    digest = blake3(derive_key_context=_VIDEO_CONTEXT)
    digest.update(struct.pack("<d", content.fps))
    for frame in content.frames:
        digest.update(blake3(frame).digest())
    return digest.digest()
