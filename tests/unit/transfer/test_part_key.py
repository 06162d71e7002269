"""Keys of parts: the same in every process, on every machine and in every release; different for what differs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_core.hashing import hash_units, root_hash
from kvrelay_transfer.tiers.part_key import DIGEST_BYTES, NAMESPACE_BYTES, KeyMaker, PartKey, parse_key

SECRET = bytes(range(32))
FIELDS = (b"kv", b"model", b"1")
# By secret: what lies in a Redis of years ago has these names.
GOLDEN = {
    b"": "kvr1:7b7d26db352ba6bd0914312c0c017403:cbe44fc9de5144efda92d56f7bac68a9c60ad930ff630be22365bcb6832545d8:3",
    SECRET: "kvr1:a240236ce0e72ad2d16410c3b632ecdd:09add933835eae8246ff0f12d6bf75946b44835d6f2d60555887f55058888d94:3",
}


@pytest.mark.parametrize("secret", GOLDEN)
def test_golden_vectors(secret: bytes) -> None:
    assert KeyMaker(FIELDS, secret).key(b"content", 3).text == GOLDEN[secret]


PROGRAM = """
from kvrelay_core.hashing import hash_units, root_hash
from kvrelay_transfer.tiers.part_key import KeyMaker
units = hash_units(root_hash(b"model", b"adapter", "tenant"), list(range(256)), 64, [b"", b"image"])
print(*(KeyMaker((b"kv", b"model"), bytes(32)).key(unit, 0).text for unit in units))
"""


@pytest.mark.parametrize("hash_seed", ["0", "1", "random"])
def test_a_prompt_has_the_same_keys_in_every_process(hash_seed: str) -> None:
    """Whatever Python's own hashes are there."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    units = hash_units(root_hash(b"model", b"adapter", "tenant"), list(range(256)), 64, [b"", b"image"])
    assert done.stdout.split() == [KeyMaker((b"kv", b"model"), bytes(32)).key(unit, 0).text for unit in units]


@given(st.binary(max_size=8), st.integers(0, 2**31), st.binary(max_size=4))
def test_a_key_is_what_its_text_says(content: bytes, part: int, field: bytes) -> None:
    key = KeyMaker((field,)).key(content, part)
    assert parse_key(key.text) == key
    assert len(key.namespace) == NAMESPACE_BYTES and len(key.digest) == DIGEST_BYTES


KEY = PartKey(bytes(NAMESPACE_BYTES), bytes(DIGEST_BYTES), 0)


@pytest.mark.parametrize(
    "text",
    [
        "", "kvr1", "kvr1:::0", KEY.text + "0:1", KEY.text.replace("kvr1", "kvr2"), KEY.text[:-1] + "-1",
        KEY.text[:-1] + "00", KEY.text[:-1] + "x", KEY.text.replace("00", "0g", 1), KEY.text[:6] + KEY.text[8:],
        KEY.text.upper(), f" {KEY.text}",
    ],
)  # fmt: skip
def test_what_others_keep_there_is_no_key(text: str) -> None:
    assert parse_key(text) is None


@given(st.lists(st.lists(st.binary(max_size=3), max_size=4), min_size=2, max_size=6, unique_by=tuple))
def test_namespaces_differ_whenever_a_field_does(fields: list[list[bytes]]) -> None:
    """Also where their bytes, run together, are the same."""
    namespaces = {KeyMaker(tuple(one)).namespace for one in fields}
    assert len(namespaces) == len(fields)


def test_a_key_differs_by_secret_namespace_content_and_part() -> None:
    makers = [KeyMaker((b"a",)), KeyMaker((b"b",)), KeyMaker((b"a",), SECRET), KeyMaker((b"a",), bytes(32))]
    keys = [maker.key(content, part) for maker in makers for content in (b"x", b"y") for part in (0, 1)]
    assert len({key.text for key in keys}) == len(keys)
    assert len({key.digest for key in keys}) == len(keys) // 2, "parts of one content belong together"


def test_without_the_secret_a_known_prompt_tells_nothing_of_its_key() -> None:
    """Who can read the tier, and guesses a prompt, cannot tell whether it is in there."""
    content = hash_units(root_hash(b"model", b"", "tenant"), list(range(64)), 64)[0]
    key = KeyMaker(FIELDS, SECRET).key(content, 0)
    assert content.hex() not in key.text
    assert KeyMaker(FIELDS).key(content, 0).digest != key.digest != content
