"""The life of a gRPC server: bind, serve with health and reflection, drain, stop. Knows no service of ours."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvrelay_core.errors import ConfigError
from kvrelay_core.rpc.channel import SERVER_OPTIONS, TlsFiles
from kvrelay_core.rpc.status import ErrorInterceptor


class RpcServer:
    """Add servicers to `.server` before `start()`. Health name "" says that the process lives; each service name
    says whether it is ready for work."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: TlsFiles | None = None,
        reflected: Sequence[str] = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        """`port` 0 lets the system choose. `reflected` names the services that reflection lists."""
        self._address = (host, port)
        self._tls = tls
        self._health = health.aio.HealthServicer()
        self.server = grpc.aio.server(interceptors=[ErrorInterceptor(), *interceptors], options=SERVER_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        if reflected:
            names = (*reflected, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self.server)

    async def start(self) -> int:
        """Returns the bound port; raises ConfigError when it cannot be bound."""
        host, port = self._address
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._tls is None:
                bound = self.server.add_insecure_port(address)
            else:
                bound = self.server.add_secure_port(address, self._tls.server_credentials())
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}; is the port in use?") from error
        await self.server.start()
        await self.set_serving("", True)
        return bound

    async def set_serving(self, service: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Tells health watchers first, then lets running calls end within `grace_s`."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)
