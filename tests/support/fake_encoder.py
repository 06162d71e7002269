"""An encoder without a tower, in the test's own process: it answers as the test tells it.

Each Encode is a call: the test awaits `next_call()` and answers it, or gives `num_tokens` to have all answered at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvrelay.v1 import common_pb2, encoder_pb2, kv_source_pb2, worker_pb2
from kvrelay.v1.encoder_pb2_grpc import EncoderServiceServicer, add_EncoderServiceServicer_to_server
from kvrelay.v1.kv_source_pb2_grpc import KvSourceServiceServicer, add_KvSourceServiceServicer_to_server
from kvrelay.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from kvrelay_core.errors import KvRelayError, UnsupportedError
from kvrelay_core.media.media_hash import media_hash
from kvrelay_core.media.video import MediaContent
from kvrelay_core.rpc.server import RpcServer
from kvrelay_core.rpc.wire import video_from_wire

FINGERPRINT = b"tower"  # of every one that is not told otherwise


def content_of(item: common_pb2.MediaItem) -> MediaContent:
    return video_from_wire(item.video) if item.HasField("video") else item.data


class EncodeCall:
    def __init__(self, request: encoder_pb2.EncodeRequest, fingerprint: bytes) -> None:
        self.request = request
        self.hashes = [media_hash(content_of(item), fingerprint) for item in request.media]
        self.cancelled = asyncio.Event()
        self.answer: asyncio.Future[encoder_pb2.EncodeResponse] = asyncio.get_running_loop().create_future()

    def succeed(self, num_tokens: int, source: str = "encoder") -> None:
        """Every item has that many tokens."""
        tickets = [
            common_pb2.EmbeddingTicket(
                ticket_id=f"{source}/{content_hash.hex()[:8]}",
                source=common_pb2.WorkerRef(worker_id=source),
                content_hash=content_hash,
                num_tokens=num_tokens,
            )
            for content_hash in self.hashes
        ]
        self.answer.set_result(encoder_pb2.EncodeResponse(tickets=tickets))

    def fail(self, error: KvRelayError) -> None:
        self.answer.set_exception(error)


class FakeEncoder:
    """`start()`, `stop()`; it comes back on its port."""

    def __init__(self, worker_id: str, num_tokens: int | None = None) -> None:
        self.worker_id = worker_id
        self.num_tokens = num_tokens  # of every item; None: the test answers
        self.fingerprint = FINGERPRINT
        self.role: worker_pb2.Role.ValueType = worker_pb2.ROLE_ENCODER
        self.is_draining = False
        self.reports_end = asyncio.Event()  # set: it ends the reports of its load, and nothing else
        self.report_error: KvRelayError | None = None  # what the reports end with, once
        self.num_watches = 0
        self.calls: list[EncodeCall] = []
        self.released: list[bytes] = []  # items of the tickets that were given back
        self._new_calls: asyncio.Queue[EncodeCall] = asyncio.Queue()
        self._port = 0
        self._server: RpcServer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        self._server = RpcServer("127.0.0.1", self._port)
        add_WorkerServiceServicer_to_server(_Describing(self), self._server.server)
        add_EncoderServiceServicer_to_server(_Encoding(self), self._server.server)
        add_KvSourceServiceServicer_to_server(_Source(self), self._server.server)
        self._port = await self._server.start()

    async def stop(self) -> None:
        """At once, as if killed."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def next_call(self, timeout_s: float = 5.0) -> EncodeCall:
        async with asyncio.timeout(timeout_s):
            return await self._new_calls.get()

    async def take(self, request: encoder_pb2.EncodeRequest) -> encoder_pb2.EncodeResponse:
        call = EncodeCall(request, self.fingerprint)
        self.calls.append(call)
        self._new_calls.put_nowait(call)
        if self.num_tokens is not None:
            call.succeed(self.num_tokens, self.worker_id)
        try:
            return await call.answer
        except asyncio.CancelledError:
            call.cancelled.set()
            raise


class _Encoding(EncoderServiceServicer):
    def __init__(self, encoder: FakeEncoder) -> None:
        self._encoder = encoder

    async def Encode(
        self, request: encoder_pb2.EncodeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> encoder_pb2.EncodeResponse:
        return await self._encoder.take(request)


class _Source(KvSourceServiceServicer):
    def __init__(self, encoder: FakeEncoder) -> None:
        self._encoder = encoder

    async def Connect(self, request: Any, context: Any) -> kv_source_pb2.ConnectResponse:
        raise UnsupportedError("nobody reads from a fake encoder")

    async def Follow(self, request_iterator: Any, context: Any) -> AsyncIterator[kv_source_pb2.FollowResponse]:
        raise UnsupportedError("nobody reads from a fake encoder")
        yield

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[kv_source_pb2.FetchResponse]:
        raise UnsupportedError("nobody reads from a fake encoder")
        yield

    async def Lookup(self, request: Any, context: Any) -> kv_source_pb2.LookupResponse:
        raise UnsupportedError("nobody reads from a fake encoder")

    async def Release(self, request: kv_source_pb2.ReleaseRequest, context: Any) -> kv_source_pb2.ReleaseResponse:
        self._encoder.released.append(request.embedding_ticket.content_hash)
        return kv_source_pb2.ReleaseResponse(released=True)


class _Describing(WorkerServiceServicer):
    def __init__(self, encoder: FakeEncoder) -> None:
        self._encoder = encoder

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DescribeResponse:
        worker = common_pb2.WorkerRef(worker_id=self._encoder.worker_id, address=self._encoder.address)
        return worker_pb2.DescribeResponse(
            worker=worker, role=self._encoder.role, model_fingerprint=self._encoder.fingerprint
        )

    async def WatchLoad(self, request: worker_pb2.WatchLoadRequest, context: Any) -> AsyncIterator[Any]:
        yield worker_pb2.WatchLoadResponse(draining=self._encoder.is_draining)
        self._encoder.num_watches += 1
        await self._encoder.reports_end.wait()
        self._encoder.reports_end.clear()
        error, self._encoder.report_error = self._encoder.report_error, None
        if error is not None:
            raise error

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        raise UnsupportedError("a fake encoder does not drain")
