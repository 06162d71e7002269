"""The media of a request: their content, names and sizes. Other URLs than `data:` are fetched where that is allowed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.common_pb2 import MediaItem
from kvrelay_core.errors import InvalidRequestError, OverloadedError, UnsupportedError
from kvrelay_core.media.data_url import is_data_url, read_data_url
from kvrelay_core.media.image_header import ImageHeader, read_image_header
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.video import MediaContent, VideoFrames
from kvrelay_core.media.video_header import read_video_header
from kvrelay_core.rpc.wire import video_from_wire


@dataclass(frozen=True, slots=True)
class MediaInput:
    content_hash: bytes
    content: MediaContent
    mime_type: str
    header: ImageHeader  # of an image, or of each frame of a video


class MediaFetcher(Protocol):
    async def fetch(self, url: str, on_bytes: Callable[[int], None]) -> bytes:
        """What the URL leads to; `on_bytes` is told of each piece of it as it comes. Raises KvRelayError."""
        ...


def media_items(request: pb.GenerateRequest) -> list[MediaItem]:
    """In the order in which the prompt refers to them. Raises InvalidRequestError for media in two places."""
    within = [part.media for message in request.messages.messages for part in message.content if part.HasField("media")]
    if request.media and request.WhichOneof("prompt") == "messages":
        raise InvalidRequestError("media: with messages, media belong into the content parts", field="media")
    return within or list(request.media)


async def read_media(
    items: Sequence[MediaItem],
    limits: MediaLimits,
    encoder_fingerprint: bytes,
    fetcher: MediaFetcher | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> tuple[MediaInput, ...]:
    """Decodes, names and measures them in a thread; before, what has to be is fetched, all at once.

    Raises InvalidRequestError for what is neither image nor video, or beyond the limits, UnsupportedError for what is
    not taken here, and what the fetcher and `on_bytes` do.
    """
    if not items:
        return ()
    if len(items) > limits.max_items:
        raise InvalidRequestError(f"media: {len(items)} items; allowed: {limits.max_items} a request", field="media")
    fetched = {} if fetcher is None else await _fetch(items, fetcher, on_bytes)
    return await asyncio.to_thread(lambda: tuple(_read(item, limits, encoder_fingerprint, fetched) for item in items))


async def _fetch(
    items: Sequence[MediaItem], fetcher: MediaFetcher, on_bytes: Callable[[int], None]
) -> dict[str, bytes]:
    """By URL, each once. The first failure ends them all."""
    urls = dict.fromkeys(item.url for item in items if item.WhichOneof("source") == "url")
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {
                url: group.create_task(fetcher.fetch(url, on_bytes), name="media-fetch")
                for url in urls
                if not is_data_url(url)
            }
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return {url: task.result() for url, task in tasks.items()}


class MediaBudget:
    """The bytes of the media of all requests in progress: they are kept to be encoded again."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0

    @contextlib.contextmanager
    def hold(self, request: pb.GenerateRequest) -> Iterator[Callable[[int], None]]:
        """For as long as the request runs; yields what takes more bytes for it. Both raise OverloadedError when there
        are too many."""
        held = 0

        def take(num_bytes: int) -> None:
            nonlocal held
            if num_bytes and self._num_bytes + num_bytes > self._max_bytes:
                raise OverloadedError(
                    f"requests with {self._num_bytes} bytes of media are in progress, {self._max_bytes} are allowed; "
                    "try again later"
                )
            self._num_bytes += num_bytes
            held += num_bytes

        try:
            take(sum(item.ByteSize() for item in media_items(request)))
            yield take
        finally:
            self._num_bytes -= held


def _read(item: MediaItem, limits: MediaLimits, encoder_fingerprint: bytes, fetched: dict[str, bytes]) -> MediaInput:
    if item.mime_type and not item.mime_type.startswith("image/"):
        raise UnsupportedError(
            f"media: {item.mime_type} is not taken here; send images, or a video's frames as images", field="media"
        )
    content = _content(item, limits, fetched)
    if isinstance(content, VideoFrames):
        header = read_video_header(content, limits)
    else:
        header = read_image_header(content, limits)
    return MediaInput(media_hash(content, encoder_fingerprint), content, item.mime_type, header)


def _content(item: MediaItem, limits: MediaLimits, fetched: dict[str, bytes]) -> MediaContent:
    match item.WhichOneof("source"):
        case "video":
            return video_from_wire(item.video)
        case "url":
            return fetched[item.url] if item.url in fetched else read_data_url(item.url, limits.max_item_bytes)
        case _:
            return item.data
