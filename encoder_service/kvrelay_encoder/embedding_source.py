"""KvSourceService of an encoder: the handshake, Fetch and Release; there is nothing to follow or to look up."""

from __future__ import annotations

from collections.abc import AsyncIterator

from kvrelay.v1 import kv_source_pb2 as pb
from kvrelay_core.errors import UnsupportedError
from kvrelay_worker.kv_source import KvSourceServicer
from kvrelay_worker.stream_end import Context


class EmbeddingSourceServicer(KvSourceServicer):
    async def Follow(
        self, request_iterator: AsyncIterator[pb.FollowRequest], context: Context
    ) -> AsyncIterator[pb.FollowResponse]:
        raise UnsupportedError("this is an encoder: the ticket of an embedding is complete when it is issued")
        yield  # a stream by its signature

    async def Lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        raise UnsupportedError("this is an encoder: it has no KV")
