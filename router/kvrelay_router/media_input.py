"""The media of a request: their bytes, names and sizes. Bytes and `data:` URLs are taken; nothing is fetched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.common_pb2 import MediaItem
from kvrelay_core.errors import InvalidRequestError, OverloadedError, UnsupportedError
from kvrelay_core.media.data_url import read_data_url
from kvrelay_core.media.image_header import ImageHeader, read_image_header
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.media_hash import media_hash


@dataclass(frozen=True, slots=True)
class MediaInput:
    content_hash: bytes
    data: bytes
    mime_type: str
    header: ImageHeader


def media_items(request: pb.GenerateRequest) -> list[MediaItem]:
    """In the order in which the prompt refers to them. Raises InvalidRequestError for media in two places."""
    within = [part.media for message in request.messages.messages for part in message.content if part.HasField("media")]
    if request.media and request.WhichOneof("prompt") == "messages":
        raise InvalidRequestError("media: with messages, media belong into the content parts", field="media")
    return within or list(request.media)


async def read_media(
    items: Sequence[MediaItem], limits: MediaLimits, encoder_fingerprint: bytes
) -> tuple[MediaInput, ...]:
    """Decodes, names and measures them in a thread.

    Raises InvalidRequestError for what is no image or beyond the limits, UnsupportedError for what is not taken here.
    """
    if not items:
        return ()
    if len(items) > limits.max_items:
        raise InvalidRequestError(f"media: {len(items)} items; allowed: {limits.max_items} a request", field="media")
    return await asyncio.to_thread(lambda: tuple(_read(item, limits, encoder_fingerprint) for item in items))


class MediaBudget:
    """The bytes of the media of all requests in progress: they are kept to be encoded again."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0

    @contextlib.contextmanager
    def hold(self, request: pb.GenerateRequest) -> Iterator[None]:
        """For as long as the request runs. Raises OverloadedError when there are too many."""
        num_bytes = sum(item.ByteSize() for item in media_items(request))
        if num_bytes and self._num_bytes + num_bytes > self._max_bytes:
            raise OverloadedError(
                f"requests with {self._num_bytes} bytes of media are in progress, {self._max_bytes} are allowed; try "
                "again later"
            )
        self._num_bytes += num_bytes
        try:
            yield
        finally:
            self._num_bytes -= num_bytes


def _read(item: MediaItem, limits: MediaLimits, encoder_fingerprint: bytes) -> MediaInput:
    if item.mime_type and not item.mime_type.startswith("image/"):
        raise UnsupportedError(f"media: {item.mime_type} is not taken here; send images", field="media")
    data = read_data_url(item.url, limits.max_item_bytes) if item.WhichOneof("source") == "url" else item.data
    return MediaInput(media_hash(data, encoder_fingerprint), data, item.mime_type, read_image_header(data, limits))
