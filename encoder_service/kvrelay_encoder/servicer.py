"""EncoderService: media as bytes, data URLs or frames of a video, answered by one ticket each, in order."""

from __future__ import annotations

import asyncio
import math

from kvrelay.v1 import common_pb2 as pb
from kvrelay.v1 import encoder_pb2, encoder_pb2_grpc
from kvrelay_core.errors import DeadlineError, InvalidRequestError
from kvrelay_core.media.data_url import read_data_url
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.video import MediaContent
from kvrelay_core.media.video_header import check_video
from kvrelay_core.rpc.wire import video_from_wire
from kvrelay_encoder.items import EncodeItems
from kvrelay_worker.embedding_wire import embedding_ticket_to_wire
from kvrelay_worker.stream_end import Context, at_stream_end
from kvrelay_worker.worker import Worker


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    def __init__(self, worker: Worker, items: EncodeItems, limits: MediaLimits | None = None) -> None:
        self._worker = worker
        self._items = items
        self._limits = limits or MediaLimits()

    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Context) -> encoder_pb2.EncodeResponse:
        """All or nothing: the first bad item is the error of the call, and its metadata `media_index` names it."""
        media = self._read(request)
        self._worker.streams.enter()
        at_stream_end(context, self._worker.streams.leave)
        try:
            async with asyncio.timeout(_deadline_s(request)):
                tickets = await self._items.encode(media)
        except TimeoutError as error:
            raise DeadlineError("the media were not encoded before the request's deadline") from error
        return encoder_pb2.EncodeResponse(tickets=map(embedding_ticket_to_wire, tickets))

    def _read(self, request: encoder_pb2.EncodeRequest) -> list[MediaContent]:
        if not request.media:
            raise InvalidRequestError("Encode names no media")
        if len(request.media) > self._limits.max_items:
            raise InvalidRequestError(
                f"{len(request.media)} media items; at most {self._limits.max_items} are taken at once", field="media"
            )
        return [self._read_item(item, index) for index, item in enumerate(request.media)]

    def _read_item(self, item: pb.MediaItem, index: int) -> MediaContent:
        if item.WhichOneof("source") == "video":
            video = video_from_wire(item.video)
            try:
                check_video(video, self._limits)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"media[{index}]: {error.message}", media_index=index) from error
            return video
        max_bytes = self._limits.max_item_bytes
        data = read_data_url(item.url, max_bytes) if item.WhichOneof("source") == "url" else item.data
        if not data:
            raise InvalidRequestError(f"media[{index}] is empty", media_index=index)
        if len(data) > max_bytes:
            raise InvalidRequestError(
                f"media[{index}] has {len(data)} bytes; at most {max_bytes} are taken", media_index=index
            )
        return data


def _deadline_s(request: encoder_pb2.EncodeRequest) -> float | None:
    if not request.HasField("deadline_s"):
        return None
    if math.isnan(request.deadline_s):
        raise InvalidRequestError("deadline_s is not a number; leave it out where there is none", field="deadline_s")
    return max(0.0, request.deadline_s)
