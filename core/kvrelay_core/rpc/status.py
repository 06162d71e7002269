"""The exception tree as gRPC statuses, both ways, with the class name and metadata as google.rpc details."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvrelay.v1.common_pb2 import ErrorDetail
from kvrelay_core.errors import InternalError, KvRelayError, WorkerLostError, error_from

log = logging.getLogger(__name__)

ERROR_DOMAIN = "kvrelay"
_CODES: dict[str, grpc.StatusCode] = {code.name: code for code in grpc.StatusCode}
_NAMES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def error_to_detail(error: KvRelayError) -> ErrorDetail:
    return ErrorDetail(
        code=_CODES[error.status].value[0], reason=error.reason, message=error.message, metadata=error.metadata
    )


def error_from_detail(detail: ErrorDetail) -> KvRelayError:
    return error_from(detail.reason, _NAMES.get(detail.code, "INTERNAL"), detail.message, dict(detail.metadata))


def error_from_rpc(error: grpc.RpcError, peer: str) -> KvRelayError:
    """The typed form of a failed call. An UNAVAILABLE without details is the transport's: the peer is lost."""
    code = error.code()
    rich = rpc_status.from_call(error)
    if rich is not None:
        for detail in rich.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
                return error_from(info.reason, code.name, rich.message, dict(info.metadata))
    message = f"{peer}: {error.details() or code.name}"
    if code is grpc.StatusCode.UNAVAILABLE:
        return WorkerLostError(message, peer=peer)
    return error_from("", code.name, message)


def _rich_status(error: KvRelayError) -> Any:
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    packed = AnyMessage()
    packed.Pack(info)
    code = _CODES[error.status].value[0]
    return rpc_status.to_status(status_pb2.Status(code=code, message=error.message, details=[packed]))


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: KvRelayError) -> NoReturn:
    status = _rich_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("context.abort returned")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions that leave a handler into statuses. Unknown ones are bugs: logged, INTERNAL."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # type: ignore[return-value]  # unknown method: gRPC answers UNIMPLEMENTED
        return _wrap(handler, handler_call_details.method)


def _wrap(handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
    maker: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(bool(handler.request_streaming), bool(handler.response_streaming))]
    inner: Any = next(
        behaviour
        for behaviour in (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        if behaviour is not None
    )
    guarded = _guard_stream(inner, method) if handler.response_streaming else _guard_unary(inner, method)
    return maker(guarded, handler.request_deserializer, handler.response_serializer)  # type: ignore[no-any-return]


def _typed(error: Exception, method: str) -> KvRelayError:
    if isinstance(error, KvRelayError):
        return error
    log.exception("unexpected error in %s", method, exc_info=error)
    return InternalError(f"unexpected {type(error).__name__} in {method}; see the server's log")


def _guard_unary(inner: Any, method: str) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await inner(request, context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort_with(context, _typed(error, method))

    return guarded


def _guard_stream(inner: Any, method: str) -> Any:
    """gRPC takes two forms of streaming handlers: generators, and coroutines that write to the context (as the
    health service's Watch does)."""

    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            answer = inner(request, context)
            if inspect.isawaitable(answer):
                await answer
                return
            async for response in answer:
                yield response
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            await abort_with(context, _typed(error, method))

    return guarded
