from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc as rpc
from kvrelay_core.errors import ConfigError, InternalError, PoolExhaustedError, WorkerLostError
from kvrelay_core.rpc.channel import open_channel
from kvrelay_core.rpc.server import RpcServer
from kvrelay_core.rpc.status import error_from_rpc

SERVICE = "kvrelay.v1.InferenceService"


class Failing(rpc.InferenceServiceServicer):
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(request_id="first")
        raise PoolExhaustedError("no room", needed=3)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        raise RuntimeError("a bug")


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1", 0, reflected=[SERVICE])
    rpc.add_InferenceServiceServicer_to_server(Failing(), server.server)
    yield f"127.0.0.1:{await server.start()}"
    await server.stop(0)


async def test_a_typed_error_in_a_stream_arrives_as_what_it_was(address: str) -> None:
    async with open_channel(address) as channel:
        stream = rpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest())
        first = await stream.read()
        assert isinstance(first, pb.GenerateResponse)
        assert first.request_id == "first"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
    error = error_from_rpc(caught.value, address)
    assert type(error) is PoolExhaustedError
    assert error.metadata == {"needed": "3"}
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_bug_is_internal_and_logged(address: str, caplog: pytest.LogCaptureFixture) -> None:
    async with open_channel(address) as channel:
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.InferenceServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest())
    assert type(error_from_rpc(caught.value, address)) is InternalError
    assert "a bug" in caplog.text
    assert "a bug" not in (caught.value.details() or "")


async def test_a_peer_that_is_not_there_is_lost() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.InferenceServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest(), timeout=5)
    assert type(error_from_rpc(caught.value, "127.0.0.1:1")) is WorkerLostError


async def test_health_follows_readiness() -> None:
    server = RpcServer("127.0.0.1", 0)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        alive = await stub.Check(health_pb2.HealthCheckRequest(service=""))
        assert alive.status == health_pb2.HealthCheckResponse.SERVING
        for serving in (False, True):
            await server.set_serving(SERVICE, serving)
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (answer.status == health_pb2.HealthCheckResponse.SERVING) is serving
    await server.stop(0)


async def test_health_can_be_watched() -> None:
    server = RpcServer("127.0.0.1", 0)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        seen = [(await watch.read()).status]
        await server.set_serving(SERVICE, True)
        seen.append((await watch.read()).status)
        watch.cancel()
    await server.stop(0)
    assert seen == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN, health_pb2.HealthCheckResponse.SERVING]


async def test_a_taken_port_is_a_config_error(address: str) -> None:
    second = RpcServer("127.0.0.1", int(address.rpartition(":")[2]))
    with pytest.raises(ConfigError, match="in use"):
        await second.start()
    await second.stop(0)
