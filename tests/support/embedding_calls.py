"""A client of encoders and prefill workers themselves: it gets tickets for pictures, and takes any ticket anywhere."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from types import TracebackType

import grpc
from picture_questions import NUM_ROWS, PAD

from kvrelay.v1 import encoder_pb2, kv_source_pb2, prefill_pb2
from kvrelay.v1.common_pb2 import EmbeddingTicket, MediaItem
from kvrelay.v1.encoder_pb2_grpc import EncoderServiceStub
from kvrelay.v1.kv_source_pb2_grpc import KvSourceServiceStub
from kvrelay.v1.prefill_pb2_grpc import PrefillServiceStub
from kvrelay_core.errors import KvRelayError
from kvrelay_core.request import AttemptId, Generation, MediaReference, SamplingParams
from kvrelay_core.rpc.channel import open_channel
from kvrelay_core.rpc.status import error_from_detail, error_from_rpc
from kvrelay_core.rpc.wire import attempt_to_wire, generation_to_wire

CALL_DEADLINE_S = 20.0
GRID = (1, 16, 16)  # of a picture of 64 x 64 pixels, in patches
MOST_AT_ONCE = 32  # media in one Encode


class EmbeddingCalls:
    def __init__(self, encoder: str, prefill: str) -> None:
        """Their addresses."""
        self._addresses = (encoder, prefill)

    async def __aenter__(self) -> EmbeddingCalls:
        self._channels = [open_channel(address) for address in self._addresses]
        self._encoder = EncoderServiceStub(self._channels[0])
        self._source = KvSourceServiceStub(self._channels[0])
        self._prefill = PrefillServiceStub(self._channels[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for channel in self._channels:
            await channel.close()

    async def encode(self, pictures: Sequence[bytes]) -> list[EmbeddingTicket]:
        """Raises what the encoder answers instead."""
        try:
            answer = await self._encoder.Encode(
                encoder_pb2.EncodeRequest(media=[MediaItem(data=picture) for picture in pictures]),
                timeout=CALL_DEADLINE_S,
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._addresses[0]) from error
        return list(answer.tickets)

    async def release(self, ticket: EmbeddingTicket) -> bool:
        """Whether it was pinned until now. Raises what the encoder answers instead."""
        request = kv_source_pb2.ReleaseRequest(embedding_ticket=ticket)
        try:
            return bool((await self._source.Release(request, timeout=CALL_DEADLINE_S)).released)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._addresses[0]) from error

    async def evict_all(self, pictures: Sequence[bytes]) -> None:
        """Encodes these, one after the other, without keeping them pinned."""
        for first in range(0, len(pictures), MOST_AT_ONCE):
            for ticket in await self.encode(pictures[first : first + MOST_AT_ONCE]):
                await self.release(ticket)  # unless its time was over before

    async def first_token(
        self, prompt: list[int], ticket: EmbeddingTicket, content_hash: bytes | None = None
    ) -> int | KvRelayError:
        """Of a prompt with one placeholder; `content_hash` is the picture's in the request, or the ticket's."""
        offset = prompt.index(PAD)
        reference = MediaReference(content_hash or ticket.content_hash, offset, NUM_ROWS, GRID)
        expanded = (*prompt[:offset], *[PAD] * NUM_ROWS, *prompt[offset + 1 :])
        sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        generation = generation_to_wire(
            Generation(prompt=expanded, sampling=sampling, seed=1, cache_salt=uuid.uuid4().hex, media=(reference,))
        )
        generation.media[0].ticket.CopyFrom(ticket)
        attempt = attempt_to_wire(AttemptId("direct", uuid.uuid4().hex, 1))
        request = prefill_pb2.PrefillRequest(attempt=attempt, generation=generation, handoff=False)
        try:
            async for response in self._prefill.Prefill(request, timeout=CALL_DEADLINE_S):
                match response.WhichOneof("event"):
                    case "finished":
                        return int(response.finished.first_tokens[0].token_id)
                    case "failed":
                        return error_from_detail(response.failed)
        except grpc.RpcError as error:
            return error_from_rpc(error, self._addresses[1])
        raise AssertionError("the stream of Prefill ended early")
