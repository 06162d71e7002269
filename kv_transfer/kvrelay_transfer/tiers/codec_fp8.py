"""Lossy: elements become fp8 (e4m3, 3 bits of mantissa), with a scale for each head's key or value of a token.

About half of the bytes of bf16, a quarter of fp32. A value is off by at most 2^-4 of its own size; a tiny one beside
the largest of its vector, by at most 2^-10 of that one's 1/448. Tokens may differ from those without it: it is for
users who ask for it. (Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433.) A part with a value that
is not a number is kept raw. Knows how long a vector is, nothing else of a part's shape.
"""

from __future__ import annotations

import torch

from kvrelay_core.errors import ConfigError

_LARGEST = 448.0  # of e4m3
_SCALE_BYTES = 4
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Fp8Codec:
    """Implements `codec.Codec`. The body: scales [vectors] as fp32, then elements [vectors, head_dim] as e4m3."""

    number = 2
    name = "fp8"

    def __init__(self, dtype: str, head_dim: int) -> None:
        """Raises ConfigError for a dtype that is no larger than fp8."""
        if dtype not in _DTYPES:
            raise ConfigError(f"KV of dtype {dtype} cannot be kept as fp8; use another --cache-codec")
        self._dtype = _DTYPES[dtype]
        self._head_dim = head_dim
        self._vector_bytes = head_dim * self._dtype.itemsize

    def encode(self, raw: memoryview, into: memoryview) -> int | None:
        num_vectors, rest = divmod(len(raw), self._vector_bytes)
        if rest or not num_vectors:
            return None
        values = torch.frombuffer(raw, dtype=self._dtype).view(num_vectors, -1).float()
        largest = values.abs().amax(1)
        if not bool(torch.isfinite(largest).all()):
            return None
        scales = torch.where(largest > 0, largest / _LARGEST, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
        small = (values / scales[:, None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        length = self._body_bytes(num_vectors)
        body = torch.frombuffer(into, dtype=torch.uint8, count=length)
        body[: num_vectors * _SCALE_BYTES] = scales.view(torch.uint8)
        body[num_vectors * _SCALE_BYTES :] = small.view(torch.uint8).flatten()
        return length

    def decode(self, body: memoryview, into: memoryview) -> bool:
        num_vectors, rest = divmod(len(into), self._vector_bytes)
        if rest or not num_vectors or len(body) != self._body_bytes(num_vectors):
            return False
        # A copy: the body may begin anywhere in memory.
        copy = torch.frombuffer(bytearray(body), dtype=torch.uint8)
        scales = copy[: num_vectors * _SCALE_BYTES].clone().view(torch.float32)
        small = copy[num_vectors * _SCALE_BYTES :].view(torch.float8_e4m3fn).view(num_vectors, -1)
        if not bool(torch.isfinite(scales).all()):
            return False
        values = torch.frombuffer(into, dtype=self._dtype).view(num_vectors, -1)
        values.copy_(small.float() * scales[:, None])
        return True

    def _body_bytes(self, num_vectors: int) -> int:
        return num_vectors * (_SCALE_BYTES + self._head_dim)
