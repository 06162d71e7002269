"""Codecs of parts: lossless is lossless, fp8 is off by no more than it says, and rubbish is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.tiers.codec import Codec
from kvrelay_transfer.tiers.codec_fp8 import Fp8Codec
from kvrelay_transfer.tiers.codec_zstd import ZstdCodec

HEAD_DIM = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def part_of(dtype: str, num_vectors: int = 1024, scale: float = 3.0, seed: int = 1) -> tuple[torch.Tensor, memoryview]:
    """Values [vectors, head_dim], of another size in each, and their bytes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_vectors, HEAD_DIM, generator=generator) * scale
    values *= torch.logspace(-2, 1, num_vectors)[:, None]
    part = values.to(DTYPES[dtype])
    return part, memoryview(bytearray(part.view(torch.uint8).numpy().tobytes()))


def there_and_back(codec: Codec, raw: memoryview) -> tuple[int, memoryview]:
    into = memoryview(bytearray(len(raw)))
    length = codec.encode(raw, into)
    assert length is not None and length < len(raw)
    back = memoryview(bytearray(len(raw)))
    assert codec.decode(into[:length], back)
    return length, back


@pytest.mark.parametrize("dtype", DTYPES)
def test_zstd_is_lossless_and_smaller(dtype: str) -> None:
    _, raw = part_of(dtype)
    length, back = there_and_back(ZstdCodec(DTYPES[dtype].itemsize), raw)
    assert back == raw
    assert length < 0.95 * len(raw)


def test_planes_are_what_makes_it_smaller() -> None:
    _, raw = part_of("float32")
    length, _ = there_and_back(ZstdCodec(4), raw)
    assert length < 0.95 * len(zstandard.ZstdCompressor(level=1).compress(raw))


def test_noise_is_kept_raw() -> None:
    noise = memoryview(bytearray(random.Random(1).randbytes(1 << 16)))
    assert ZstdCodec(2).encode(noise, memoryview(bytearray(len(noise)))) is None


def test_a_part_that_is_no_whole_number_of_elements_is_kept_raw() -> None:
    odd = memoryview(bytearray(1001))
    assert ZstdCodec(2).encode(odd, memoryview(bytearray(len(odd)))) is None
    assert Fp8Codec("bfloat16", 10).encode(odd, memoryview(bytearray(len(odd)))) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_off_by_no_more_than_it_says(dtype: str) -> None:
    part, raw = part_of(dtype)
    length, back = there_and_back(Fp8Codec(dtype, HEAD_DIM), raw)
    assert length == 1024 * (4 + HEAD_DIM)
    values, got = part.double(), torch.frombuffer(back, dtype=DTYPES[dtype]).view(1024, -1).double()
    largest = values.abs().amax(1, keepdim=True)
    rounding = 2.0**-8 if dtype == "bfloat16" else 2.0**-11 if dtype == "float16" else 2.0**-23
    bound = values.abs() * (2.0**-4 + 2 * rounding) + largest / 448 * 2.0**-10 * 1.01
    assert bool(((got - values).abs() <= bound).all())
    assert not torch.equal(got, values)


def test_fp8_keeps_zeros_and_the_largest_value() -> None:
    part = torch.zeros(2, HEAD_DIM)
    part[1, 5] = -7.0
    _, back = there_and_back(Fp8Codec("float32", HEAD_DIM), memoryview(bytearray(part.numpy().tobytes())))
    assert torch.equal(torch.frombuffer(back, dtype=torch.float32).view(2, -1), part)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_fp8_keeps_a_part_raw_whose_values_are_not_numbers(bad: float) -> None:
    part, _ = part_of("float32")
    part[3, 7] = bad
    raw = memoryview(bytearray(part.numpy().tobytes()))
    assert Fp8Codec("float32", HEAD_DIM).encode(raw, memoryview(bytearray(len(raw)))) is None


def test_fp8_of_fp8_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="--cache-codec"):
        Fp8Codec("float8_e4m3", 10)


CODECS: dict[str, Callable[[], Codec]] = {"zstd": lambda: ZstdCodec(4), "fp8": lambda: Fp8Codec("float32", 64)}


@pytest.mark.parametrize("name", CODECS)
@given(body=st.binary(max_size=600), num_bytes=st.sampled_from([0, 3, 256, 512]))
def test_rubbish_is_refused_or_fills_its_room(name: str, body: bytes, num_bytes: int) -> None:
    CODECS[name]().decode(memoryview(body), memoryview(bytearray(num_bytes)))


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_never_raises(position: int, bit: int) -> None:
    """That it is noticed is the checksum's part."""
    codec, (_, raw) = ZstdCodec(4), part_of("float32", num_vectors=16)
    into = memoryview(bytearray(len(raw)))
    length = codec.encode(raw, into)
    assert length is not None
    into[position % length] ^= 1 << bit
    codec.decode(into[:length], memoryview(bytearray(len(raw))))


def test_a_size_that_was_tampered_with_takes_no_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    body = len(bomb).to_bytes(4, "little") * 4 + bomb * 4
    assert not ZstdCodec(4).decode(memoryview(body), memoryview(bytearray(4096)))
