"""Lossless: the bytes of each element are put apart, and zstd compresses each of the planes.

The upper bytes of floating-point numbers (sign and exponent) are alike and become small, the lower ones are noise and
stay; together in one stream they would share one table of symbols. What does not become smaller by a few percent is
kept raw. Knows the size of an element, not what it means.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

_WORTH_IT = 0.97  # of the raw size, at most
_LENGTH_BYTES = 4


class ZstdCodec:
    """Implements `codec.Codec`. The body: each plane's length as u32, then the planes as zstd frames."""

    number = 1
    name = "zstd"

    def __init__(self, element_bytes: int, level: int = 1) -> None:
        self._element_bytes = element_bytes
        self._contexts = _Contexts(level)

    def encode(self, raw: memoryview, into: memoryview) -> int | None:
        if len(raw) % self._element_bytes or not raw:
            return None
        planes = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(-1, self._element_bytes).T)
        frames = [self._contexts.compressor.compress(plane.data) for plane in planes]
        body = b"".join([*(len(frame).to_bytes(_LENGTH_BYTES, "little") for frame in frames), *frames])
        if len(body) > _WORTH_IT * len(raw):
            return None
        into[: len(body)] = body
        return len(body)

    def decode(self, body: memoryview, into: memoryview) -> bool:
        num_elements, rest = divmod(len(into), self._element_bytes)
        frames = self._split(body)
        if rest or not num_elements or frames is None:
            return False
        elements = np.frombuffer(into, np.uint8).reshape(num_elements, self._element_bytes)
        return all(self._fill(elements[:, number], frame) for number, frame in enumerate(frames))

    def _split(self, body: memoryview) -> list[memoryview] | None:
        """One frame for each plane; None where the lengths do not add up."""
        begin = self._element_bytes * _LENGTH_BYTES
        if len(body) < begin:
            return None
        lengths = np.frombuffer(body[:begin], "<u4").tolist()
        if begin + sum(lengths) != len(body):
            return None
        ends = (begin + np.cumsum(lengths)).tolist()
        return [body[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def _fill(self, column: NDArray[np.uint8], frame: memoryview) -> bool:
        try:
            # A size that was tampered with would have that much memory taken.
            if zstandard.frame_content_size(frame) != len(column):
                return False
            plane = self._contexts.decompressor.decompress(frame)
        except zstandard.ZstdError:
            return False
        if len(plane) != len(column):
            return False
        column[:] = np.frombuffer(plane, np.uint8)
        return True


class _Contexts(threading.local):
    """They are not to be shared by threads."""

    def __init__(self, level: int) -> None:
        self.compressor = zstandard.ZstdCompressor(level=level)
        self.decompressor = zstandard.ZstdDecompressor()
