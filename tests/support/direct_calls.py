"""A client of the workers themselves: it gets a ticket from a prefill worker, and takes any ticket to a decode worker.

async with DirectCalls(prefill_address, decode_address) as calls:
    prefilled = await calls.prefill(prompt)
    outcome = await calls.decode(prompt, prefilled.ticket, prefilled.attempt)
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc
from msgspec.structs import replace

from kvrelay.v1 import decode_pb2, kv_source_pb2_grpc, prefill_pb2
from kvrelay.v1.common_pb2 import KvTicket
from kvrelay.v1.decode_pb2_grpc import DecodeServiceStub
from kvrelay.v1.prefill_pb2_grpc import PrefillServiceStub
from kvrelay_core.errors import KvRelayError
from kvrelay_core.request import AttemptId, ChoiceState, Generation, SamplingParams
from kvrelay_core.rpc.channel import open_channel
from kvrelay_core.rpc.status import error_from_detail, error_from_rpc
from kvrelay_core.rpc.wire import attempt_to_wire, choice_state_to_wire, generation_to_wire

NUM_TOKENS = 8
CALL_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Prefilled:
    attempt: AttemptId
    ticket: KvTicket
    first_token: int


@dataclass
class Outcome:
    """Of one Decode call. `tokens` begin behind what was committed when it resumed."""

    tokens: list[int] = field(default_factory=list)
    pulled_blocks: int | None = None  # None: no hand-off was accepted
    lost: KvRelayError | None = None  # the cause of a HandoffLost
    failed: KvRelayError | None = None
    is_finished: bool = False

    @property
    def refusal(self) -> KvRelayError:
        """Why there is no token."""
        assert self.tokens == [] and self.pulled_blocks is None and not self.is_finished, f"taken: {self}"
        error = self.lost or self.failed
        assert error is not None, "the stream ended without tokens and without a reason"
        return error


def new_attempt() -> AttemptId:
    return AttemptId("direct", uuid.uuid4().hex, 1)


def next_attempt(attempt: AttemptId) -> AttemptId:
    return replace(attempt, attempt=attempt.attempt + 1)


def greedy(prompt: Sequence[int], cache_salt: str = "") -> Generation:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return Generation(prompt=tuple(prompt), sampling=sampling, seed=1, cache_salt=cache_salt)


def prefill_request(prompt: Sequence[int], attempt: AttemptId, cache_salt: str = "") -> prefill_pb2.PrefillRequest:
    generation = generation_to_wire(greedy(prompt, cache_salt))
    return prefill_pb2.PrefillRequest(attempt=attempt_to_wire(attempt), generation=generation, handoff=True)


class DirectCalls:
    def __init__(self, prefill: str, decode: str, cache_salt: str = "") -> None:
        self._addresses = (prefill, decode)
        self._cache_salt = cache_salt

    async def __aenter__(self) -> DirectCalls:
        self._channels = [open_channel(address) for address in self._addresses]
        prefill, decode = self._channels
        self.prefill_stub = PrefillServiceStub(prefill)
        self.source_stub = kv_source_pb2_grpc.KvSourceServiceStub(prefill)
        self.decode_stub = DecodeServiceStub(decode)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for channel in self._channels:
            await channel.close()

    # --------------------------------------------------------------------------------------------- prefill

    async def prefill(self, prompt: Sequence[int]) -> Prefilled:
        """Reads the stream to its end. Raises what the worker answers instead."""
        attempt, ticket = new_attempt(), None
        try:
            call = self.prefill_stub.Prefill(
                prefill_request(prompt, attempt, self._cache_salt), timeout=CALL_DEADLINE_S
            )
            async for response in call:
                match response.WhichOneof("event"):
                    case "accepted":
                        ticket = response.accepted.ticket
                    case "failed":
                        raise error_from_detail(response.failed)
                    case "finished":
                        assert ticket is not None, "finished before it was accepted"
                        [first] = response.finished.first_tokens
                        return Prefilled(attempt, ticket, first.token_id)
        except grpc.RpcError as error:
            raise error_from_rpc(error, self._addresses[0]) from error
        raise AssertionError("the stream of Prefill ended early")

    # ---------------------------------------------------------------------------------------------- decode

    async def decode(
        self, prompt: Sequence[int], ticket: KvTicket, attempt: AttemptId, *, resume: Sequence[int] | None = None
    ) -> Outcome:
        """`resume`: what to answer a HandoffLost with, the committed tokens; without it the call ends there."""
        outcome = Outcome()
        call = self.decode_stub.Decode(timeout=CALL_DEADLINE_S)
        start = decode_pb2.DecodeStart(
            attempt=attempt_to_wire(attempt),
            generation=generation_to_wire(greedy(prompt, self._cache_salt)),
            ticket=ticket,
        )
        try:
            await call.write(decode_pb2.DecodeRequest(start=start))
            await self._read(call, outcome, attempt, resume)
        except grpc.RpcError as error:
            outcome.failed = error_from_rpc(error, self._addresses[1])
        except asyncio.InvalidStateError:  # what writing to a stream that was refused at once raises
            outcome.failed = await self._refusal(call)
        finally:
            call.cancel()
        return outcome

    async def _read(self, call: Any, outcome: Outcome, attempt: AttemptId, resume: Sequence[int] | None) -> None:
        first_position = 0
        while (response := await call.read()) is not grpc.aio.EOF:
            if response.WhichOneof("message") == "tokens":
                for position, token_id in zip(response.tokens.positions, response.tokens.token_ids, strict=True):
                    assert position == first_position + len(outcome.tokens), "a position too many or too few"
                    outcome.tokens.append(token_id)
                continue
            event = response.event
            match event.WhichOneof("event"):
                case "accepted":
                    outcome.pulled_blocks = event.accepted.handoff.blocks_pulled
                case "finished":
                    outcome.is_finished = True
                case "handoff_lost":
                    assert not outcome.tokens, "tokens before the hand-off was lost"
                    outcome.lost = error_from_detail(event.handoff_lost.cause)
                    if resume is None:
                        return
                    first_position = len(resume)
                    await call.write(_resume(next_attempt(attempt), resume))
                case "failed":
                    outcome.failed = error_from_detail(event.failed)
                case other:
                    raise AssertionError(f"unexpected {other}")

    async def _refusal(self, call: Any) -> KvRelayError:
        try:
            await call.read()
        except grpc.RpcError as error:
            return error_from_rpc(error, self._addresses[1])
        raise AssertionError("the stream ended early and without an error")


def _resume(attempt: AttemptId, committed: Sequence[int]) -> decode_pb2.DecodeRequest:
    choice = choice_state_to_wire(ChoiceState(0, tuple(committed)))
    return decode_pb2.DecodeRequest(resume=decode_pb2.DecodeResume(attempt=attempt_to_wire(attempt), choices=[choice]))
