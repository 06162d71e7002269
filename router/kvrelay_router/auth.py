"""Bearer tokens at the front door. Health checks and reflection stay open; worker services are not here."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc

from kvrelay_core.errors import ConfigError, UnauthenticatedError

_GUARDED = "/kvrelay.v1.InferenceService/"
_SCHEME = "bearer "


def read_api_keys(path: Path) -> tuple[bytes, ...]:
    """One key a line; empty lines and lines that begin with # are left out. Raises ConfigError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error}") from error
    keys = tuple(line.encode() for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{path} holds no API key; write one a line, or leave the flag out to check none")
    return keys


class BearerAuth(grpc.aio.ServerInterceptor):
    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler: Any = await continuation(handler_call_details)
        guarded = handler_call_details.method.startswith(_GUARDED)
        if handler is None or not guarded or self._is_known(handler_call_details.invocation_metadata):
            return handler  # type: ignore[no-any-return]
        return _refusing(handler)  # type: ignore[no-any-return]

    def _is_known(self, metadata: Any) -> bool:
        given = b""
        for name, value in metadata or ():
            if name == "authorization" and str(value).lower().startswith(_SCHEME):
                given = str(value)[len(_SCHEME) :].strip().encode()
        # Every key is compared, each in constant time, so that the time tells nothing.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)


async def _refuse(request: Any, context: Any) -> NoReturn:
    raise UnauthenticatedError("missing or unknown API key; send the metadata `authorization: Bearer KEY`")


def _refusing(handler: Any) -> Any:
    """Unary requests are all that the front door has; the refusal keeps the kind of the response."""
    if not handler.response_streaming:
        return grpc.unary_unary_rpc_method_handler(_refuse, handler.request_deserializer, handler.response_serializer)

    async def refuse_stream(request: Any, context: Any) -> Any:
        await _refuse(request, context)
        yield  # makes it a stream

    return grpc.unary_stream_rpc_method_handler(
        refuse_stream, handler.request_deserializer, handler.response_serializer
    )
