"""Parts as they lie in a tier: what is whole and asked for is opened, everything else is told apart and refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_transfer.tiers.part_format import HEADER_BYTES, BadPart, PartHeader, open_part, read_header, seal_part
from kvrelay_transfer.tiers.part_key import KeyMaker, PartKey

SECRET = bytes(range(32))
KEY = KeyMaker((b"kv", b"model", b"1")).key(b"content", 3)
BODY = b"hello"
# Without and with a secret: what lies in a Redis of years ago looks like this.
GOLDEN = (
    "4b56525041525400010001000300000004000000140000000000000005000000000000007b7d26db352ba6bd0914312c"
    "0c017403cbe44fc9de5144efda92d56f7bac68a9c60ad930ff630be22365bcb6832545d8788d6b4b62dd70a557735e79"
    "64b13f901786ff3b7d2611118285a3d5177b631900000000000000000000000068656c6c6f"
)
GOLDEN_KEYED = (
    "4b5652504152540001000100030000000400000014000000000000000500000000000000a240236ce0e72ad2d16410c3"
    "b632ecdd09add933835eae8246ff0f12d6bf75946b44835d6f2d60555887f55058888d9499777aa5c028f946940a0ea3"
    "497dbcd1b7580bb012b9e6ce5d545ce861fc8d4900000000000000000000000068656c6c6f"
)


def sealed(key: PartKey = KEY, body: bytes = BODY, secret: bytes = b"") -> memoryview:
    part = memoryview(bytearray(HEADER_BYTES + len(body)))
    part[HEADER_BYTES:] = body
    seal_part(PartHeader(key, 4, 20, len(body), codec=1), part, secret)
    return part


def test_golden_vectors() -> None:
    assert sealed().hex() == GOLDEN
    keyed = KeyMaker((b"kv", b"model", b"1"), SECRET).key(b"content", 3)
    assert sealed(keyed, secret=SECRET).hex() == GOLDEN_KEYED


@pytest.mark.parametrize("secret", [b"", SECRET])
@pytest.mark.parametrize("body", [b"", BODY, bytes(5000)])
def test_what_was_sealed_is_opened(body: bytes, secret: bytes) -> None:
    part = sealed(body=body, secret=secret)
    assert open_part(KEY, part, secret) == PartHeader(KEY, 4, 20, len(body), 1) == read_header(part)
    assert part[HEADER_BYTES:] == body


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 4])
def test_a_truncated_part(length: int) -> None:
    assert open_part(KEY, sealed()[:length]) is BadPart.TRUNCATED


def test_a_part_with_something_behind_it() -> None:
    assert open_part(KEY, memoryview(bytearray(sealed()) + b"x")) is BadPart.TRUNCATED


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(part=2), KEY._replace(digest=bytes(32)), KEY._replace(namespace=bytes(16)),
        KeyMaker((b"kv", b"other model", b"1")).key(b"content", 3),
    ],
)  # fmt: skip
def test_another_part_under_this_name(other: PartKey) -> None:
    assert open_part(KEY, sealed(other)) is BadPart.FOREIGN


def test_what_is_not_ours_or_of_another_release() -> None:
    assert open_part(KEY, memoryview(bytearray(500))) is BadPart.FOREIGN
    part = sealed()
    part[8] = 2  # the version
    assert open_part(KEY, part) is BadPart.FOREIGN


@given(st.integers(0, HEADER_BYTES + len(BODY) - 1), st.integers(0, 7))
def test_any_flipped_bit_that_matters_is_noticed(position: int, bit: int) -> None:
    part = sealed()
    part[position] ^= 1 << bit
    is_padding = 116 <= position < HEADER_BYTES
    assert isinstance(open_part(KEY, part), PartHeader) is is_padding


@given(st.binary(max_size=400))
def test_rubbish_never_raises(data: bytes) -> None:
    assert isinstance(open_part(KEY, memoryview(data)), BadPart)


def test_who_does_not_have_the_secret_makes_no_part() -> None:
    assert open_part(KEY, sealed(), SECRET) is BadPart.DAMAGED
    assert open_part(KEY, sealed(secret=bytes(32)), SECRET) is BadPart.DAMAGED
    assert open_part(KEY, sealed(secret=SECRET)) is BadPart.DAMAGED
