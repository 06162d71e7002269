"""`data:` URLs (RFC 2397), in base64 only."""

from __future__ import annotations

import base64
import binascii

from kvrelay_core.errors import InvalidRequestError, UnsupportedError

_PREFIX = "data:"


def is_data_url(url: str) -> bool:
    return url[: len(_PREFIX)].lower() == _PREFIX


def read_data_url(url: str, max_bytes: int) -> bytes:
    """The data, at most `max_bytes`.

    Raises UnsupportedError for a URL that would have to be fetched, InvalidRequestError for malformed or too much data.
    """
    if not is_data_url(url):
        raise UnsupportedError(
            "media: fetching of URLs is off; send the image's bytes, or a URL that begins with data:", field="media"
        )
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequestError("media: the data URL must have the form data:image/png;base64,...", field="media")
    if len(body) > -(-max_bytes // 3) * 4:
        raise InvalidRequestError(f"media: the data URL has more than the {max_bytes} bytes allowed", field="media")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"media: the data URL is not valid base64: {error}", field="media") from error
    if len(data) > max_bytes:
        raise InvalidRequestError(f"media: the data URL has more than the {max_bytes} bytes allowed", field="media")
    return data
