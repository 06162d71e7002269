from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_core.errors import InvalidRequestError, UnsupportedError
from kvrelay_core.media.data_url import read_data_url
from kvrelay_core.media.media_hash import media_hash


@given(st.binary(max_size=100))
def test_data_comes_back_as_it_was(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    assert read_data_url(f"data:image/png;base64,{text}", max_bytes=100) == data
    assert read_data_url(f"DATA:;BASE64,{text}", max_bytes=100) == data


@pytest.mark.parametrize("url", ["https://example.org/cat.png", "file:///etc/passwd", "/etc/passwd", "", "dat"])
def test_other_urls_are_not_fetched(url: str) -> None:
    with pytest.raises(UnsupportedError, match="fetching of URLs is off"):
        read_data_url(url, max_bytes=100)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,plain",
        "data:image/png;base64",
        "data:image/png;base64,AA!A",
        "data:image/png;base64,AAA",
        "data:image/png;base64,ÄÖÜß",
        "data:;base64," + "A" * 140,
        "data:;base64," + base64.b64encode(bytes(101)).decode(),
    ],
)
def test_malformed_or_too_much_data_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_data_url(url, max_bytes=100)
    assert caught.value.metadata["field"] == "media"


def test_the_name_is_of_bytes_and_encoder_and_never_changes() -> None:
    assert media_hash(b"cat", b"tower").hex() == "ccaad9ceda87d1af0d6944a78bcc9c425460210126cd8339065cb930fb34be5c"
    names = {media_hash(b"cat", b"tower"), media_hash(b"cat ", b"tower"), media_hash(b"cat", b"other")}
    assert len(names | {media_hash(b"tower", b"cat")}) == 4
