"""Waits until a service says that it is ready, by the standard health service: told, not asked again and again."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


async def wait_serving(channel: grpc.aio.Channel, service: str) -> None:
    """Returns when `service` serves, or when the server ends the watch.

    Raises grpc.RpcError when the connection is lost.
    """
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
    try:
        async for answer in watch:
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
    finally:
        watch.cancel()
