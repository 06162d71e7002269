"""KvSourceService of an encoder: the handshake, Fetch and Release; there is nothing to follow or to look up."""

from __future__ import annotations

from collections.abc import AsyncIterator

from kvrelay.v1 import kv_source_pb2 as pb
from kvrelay_core.errors import UnsupportedError
from kvrelay_worker.kv_source import KvSourceServicer
from kvrelay_worker.stream_end import Context
from kvrelay_worker.worker import Worker


class EmbeddingSourceServicer(KvSourceServicer):
    """Unlike a step of a text engine, one of a tower is not silent: an engine that is stands still, and a reader does
    not wait for it."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._engine = worker.engine
        worker.engine.on_silence(self.give_up_waiting)

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.FetchResponse]:
        self._engine.check_moving()
        async for response in super().Fetch(request, context):
            yield response

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        self._engine.check_moving()
        return await super().Release(request, context)

    async def Follow(
        self, request_iterator: AsyncIterator[pb.FollowRequest], context: Context
    ) -> AsyncIterator[pb.FollowResponse]:
        raise UnsupportedError("this is an encoder: the ticket of an embedding is complete when it is issued")
        yield  # a stream by its signature

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        raise UnsupportedError("this is an encoder: it has no KV")
