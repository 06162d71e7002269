"""AsyncClient: calls a KVRelay router from asyncio. Errors are those of `kvrelay_core.errors`."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub
from kvrelay_client.requests import GenerateOptions, Message, build_request
from kvrelay_client.responses import (
    Completion,
    Delta,
    Finish,
    ModelInfo,
    collect,
    event_from_wire,
    model_info_from_wire,
)
from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.rpc.channel import TlsFiles, open_channel
from kvrelay_core.rpc.status import error_from_rpc

MODEL_INFO_TIMEOUT_S = 30.0


def credentials_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


class GenerateStream:
    """Iterate it for Delta and Finish events. Leaving its `async with` block, or `cancel()`, frees the workers."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target

    def __aiter__(self) -> GenerateStream:
        return self

    async def __anext__(self) -> Delta | Finish:
        """Raises a KvRelayError when the request failed."""
        while True:
            try:
                response = await self._call.read()
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error, self._target) from error
            if response is grpc.aio.EOF:
                raise StopAsyncIteration
            event = event_from_wire(response)
            if event is not None:
                return event

    def cancel(self) -> None:
        """Without effect on a stream that has ended."""
        self._call.cancel()

    async def __aenter__(self) -> GenerateStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncClient:
    """One channel to a router at `target` (HOST:PORT). Use it as `async with`, or call `close()`."""

    def __init__(self, target: str, api_key: str | None = None, *, tls: TlsFiles | None = None) -> None:
        """`tls` for a router that was started with `--tls-cert`."""
        self._target = target
        self._metadata = credentials_metadata(api_key)
        self._channel = open_channel(target, tls)
        self._stub = InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerateStream:
        """Starts a request: exactly one of text, token ids and chat messages (role, content), and options."""
        request = build_request(prompt, token_ids, messages, options)
        return GenerateStream(self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata), self._target)

    async def complete(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """The whole answer; for `n` above 1 see `complete_all`. Without `timeout_s` it waits as long as it takes."""
        require_one_choice(options)
        return (
            await self.complete_all(prompt, token_ids=token_ids, messages=messages, timeout_s=timeout_s, **options)
        )[0]

    async def complete_all(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]:
        """One Completion for each of the `n` choices."""
        async with self.generate(
            prompt, token_ids=token_ids, messages=messages, timeout_s=timeout_s, **options
        ) as stream:
            return collect([event async for event in stream])

    async def model_info(self, model: str = "", *, timeout_s: float = MODEL_INFO_TIMEOUT_S) -> ModelInfo:
        try:
            request = pb.GetModelInfoRequest(model=model)
            answer = await self._stub.GetModelInfo(request, timeout=timeout_s, metadata=self._metadata)
            return model_info_from_wire(answer)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, self._target) from error

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def require_one_choice(options: GenerateOptions) -> None:
    if options.get("n", 1) != 1:
        raise InvalidRequestError("complete() returns one choice; use complete_all() for n above 1", field="n")
