"""Client: calls a KVRelay router from threads. The same as AsyncClient without asyncio."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Unpack

import grpc

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub
from kvrelay_client.async_client import MODEL_INFO_TIMEOUT_S, credentials_metadata, require_one_choice
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
from kvrelay_core.rpc.channel import CHANNEL_OPTIONS, TlsFiles
from kvrelay_core.rpc.status import error_from_rpc


class BlockingGenerateStream:
    """Iterate it for Delta and Finish events. Leaving its `with` block, or `cancel()`, frees the workers."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target

    def __iter__(self) -> BlockingGenerateStream:
        return self

    def __next__(self) -> Delta | Finish:
        """Raises a KvRelayError when the request failed."""
        while True:
            try:
                response = next(self._call)
            except grpc.RpcError as error:
                raise error_from_rpc(error, self._target) from error
            event = event_from_wire(response)
            if event is not None:
                return event

    def cancel(self) -> None:
        """Without effect on a stream that has ended."""
        self._call.cancel()

    def __enter__(self) -> BlockingGenerateStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """One channel to a router at `target` (HOST:PORT). Use it as `with`, or call `close()`."""

    def __init__(self, target: str, api_key: str | None = None, *, tls: TlsFiles | None = None) -> None:
        """`tls` for a router that was started with `--tls-cert`."""
        self._target = target
        self._metadata = credentials_metadata(api_key)
        self._channel = _open_channel(target, tls)
        self._stub: Any = InferenceServiceStub(self._channel)

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> BlockingGenerateStream:
        """Starts a request: exactly one of text, token ids and chat messages (role, content), and options."""
        request = build_request(prompt, token_ids, messages, options)
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return BlockingGenerateStream(call, self._target)

    def complete(
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
        return self.complete_all(prompt, token_ids=token_ids, messages=messages, timeout_s=timeout_s, **options)[0]

    def complete_all(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        messages: Sequence[Message] | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]:
        """One Completion for each of the `n` choices."""
        with self.generate(prompt, token_ids=token_ids, messages=messages, timeout_s=timeout_s, **options) as stream:
            return collect(stream)

    def model_info(self, model: str = "", *, timeout_s: float = MODEL_INFO_TIMEOUT_S) -> ModelInfo:
        try:
            request = pb.GetModelInfoRequest(model=model)
            return model_info_from_wire(self._stub.GetModelInfo(request, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._target) from error

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_channel(target: str, tls: TlsFiles | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(target, tls.channel_credentials(), options=CHANNEL_OPTIONS)
