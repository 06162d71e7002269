"""Prefill and decode workers without an engine, in the test's own process, that do what the test tells them.

Each opened request is a call: the test awaits `next_call()` and answers it, or gives a `behaviour` to do so.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import grpc

from kvrelay.v1 import common_pb2, decode_pb2, prefill_pb2, worker_pb2
from kvrelay.v1.decode_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server
from kvrelay.v1.prefill_pb2_grpc import PrefillServiceServicer, add_PrefillServiceServicer_to_server
from kvrelay.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from kvrelay_core.errors import KvRelayError, UnsupportedError, WorkerLostError
from kvrelay_core.request import AttemptId, FinishReason, FirstToken, Generation, TokenLogprobs
from kvrelay_core.rpc import wire
from kvrelay_core.rpc.channel import TlsFiles
from kvrelay_core.rpc.server import RpcServer
from kvrelay_core.rpc.status import error_to_detail

MAX_MODEL_LEN = 512
VOCAB_SIZE = 384

Call = TypeVar("Call", bound="PrefillCall | DecodeCall")
Row = tuple[int, int, int]  # choice, position, token id


def token_of(choice: int, position: int) -> int:
    """What every fake worker generates: letters, which differ by choice and position."""
    return ord("a") - 33 + (7 * choice + position) % 26


class _Wire:
    """The stream of one session, as its worker's calls see it: what is sent while there is none is lost."""

    def __init__(self) -> None:
        self.outgoing: asyncio.Queue[Any] | None = None

    def send(self, message: Any) -> None:
        if self.outgoing is not None:
            self.outgoing.put_nowait(message)


class PrefillCall:
    """Tells a router that comes back what it has told before, as a real one does."""

    def __init__(self, wire_: _Wire, opened: prefill_pb2.PrefillOpen) -> None:
        self._wire = wire_
        self.handle = opened.handle
        self.handoff = opened.request.handoff
        self.media = opened.request.generation.media  # with tickets
        self.attempt: AttemptId = wire.attempt_from_wire(opened.request.attempt)
        self.generation: Generation = wire.generation_from_wire(opened.request.generation)
        self.cancelled = asyncio.Event()
        self.released = asyncio.Event()
        self.reopened = asyncio.Event()
        self.first_follow_s = 30.0
        self._told: list[prefill_pb2.PrefillResponse] = []

    def reopen(self) -> None:
        for event in self._told:
            self._put(event)
        self.reopened.set()

    def accept(self) -> None:
        accepted = prefill_pb2.PrefillAccepted()
        if self.handoff:
            accepted.ticket.ticket_id = f"ticket-{self.attempt.request_id}-{self.attempt.attempt}"
            accepted.ticket.lease.first_follow_s = self.first_follow_s
        self._send(prefill_pb2.PrefillResponse(accepted=accepted))

    def queue(self, eta_s: float) -> None:
        self._send(prefill_pb2.PrefillResponse(queued=prefill_pb2.PrefillQueued(eta_s=eta_s)))

    def finish(self, tokens: Sequence[FirstToken] | None = None, cached_tokens: int = 0) -> None:
        """By default with the next token of each choice."""
        if tokens is None:
            tokens = [self.first_token(choice.index, len(choice.committed)) for choice in self.generation.choices]
        finished = prefill_pb2.PrefillFinished(
            first_tokens=map(wire.first_token_to_wire, tokens),
            usage=common_pb2.Usage(prompt_tokens=len(self.generation.prompt), cached_tokens=cached_tokens),
            queue_s=0.25,
            compute_s=0.5,
        )
        self._send(prefill_pb2.PrefillResponse(finished=finished))

    def first_token(self, choice: int, position: int) -> FirstToken:
        sampling = self.generation.sampling
        reason = FinishReason.LENGTH if position + 1 >= sampling.max_tokens else None
        logprobs = None if sampling.logprobs is None else TokenLogprobs(-0.5, ((token_of(choice, position), -0.5),))
        return FirstToken(choice, position, token_of(choice, position), logprobs, reason)

    def fail(self, error: KvRelayError) -> None:
        self._send(prefill_pb2.PrefillResponse(failed=error_to_detail(error)))

    def _send(self, event: prefill_pb2.PrefillResponse) -> None:
        if not event.HasField("queued"):
            self._told.append(event)
        self._put(event)

    def _put(self, event: prefill_pb2.PrefillResponse) -> None:
        self._wire.send(prefill_pb2.PrefillServiceSessionResponse(handle=self.handle, event=event))


class DecodeCall:
    def __init__(self, wire_: _Wire, handle: int, start: decode_pb2.DecodeStart) -> None:
        self._wire = wire_
        self.handle = handle
        self.ticket_id = start.ticket.ticket_id
        self.attempt: AttemptId = wire.attempt_from_wire(start.attempt)
        self.generation: Generation = wire.generation_from_wire(start.generation)
        self.aborted = asyncio.Event()
        self.abort_reason = ""
        self.resumes: asyncio.Queue[decode_pb2.DecodeResume] = asyncio.Queue()
        self.reattached: asyncio.Queue[dict[int, int]] = asyncio.Queue()
        self.aborted_choices: asyncio.Queue[list[int]] = asyncio.Queue()
        self.reopened = asyncio.Event()

    def reopen(self) -> None:
        """Nothing is told again but by the test."""
        self.reopened.set()

    def accept(self) -> None:
        """All KV is here."""
        timing = common_pb2.HandoffTiming(bytes=4096, seconds=0.125, blocks_pulled=2, blocks_reused=1, connector="fake")
        self._event(decode_pb2.DecodeEvent(accepted=decode_pb2.DecodeAccepted(handoff=timing)))

    def tokens(self, *rows: Row, logprobs: common_pb2.TokenLogprobs | None = None) -> None:
        """One step; `logprobs` is what each row carries when the request asked for any."""
        entry = logprobs or common_pb2.TokenLogprobs(logprob=-0.5)
        wanted = self.generation.sampling.logprobs is not None
        step = decode_pb2.StepTokens(
            handles=[self.handle] * len(rows),
            choices=[choice for choice, _, _ in rows],
            positions=[position for _, position, _ in rows],
            token_ids=[token_id for _, _, token_id in rows],
            logprobs=[entry] * len(rows) if wanted else [],
        )
        self._wire.send(decode_pb2.DecodeServiceSessionResponse(tokens=step))

    def generate(self, first: int, end: int, choice: int = 0) -> None:
        """The positions [first, end), a message each."""
        for position in range(first, end):
            self.tokens((choice, position, token_of(choice, position)))

    def end(self, num_tokens: int, choice: int = 0, reason: FinishReason = FinishReason.LENGTH, **more: int) -> None:
        finished = decode_pb2.ChoiceFinished(
            choice=choice, reason=wire.finish_reason_to_wire(reason), num_tokens=num_tokens, **more
        )
        self._event(decode_pb2.DecodeEvent(finished=finished))

    def lose_handoff(self, error: KvRelayError, verified_tokens: int = 0) -> None:
        lost = decode_pb2.HandoffLost(cause=error_to_detail(error), verified_tokens=verified_tokens)
        self._event(decode_pb2.DecodeEvent(handoff_lost=lost))

    def hand_back(self, error: KvRelayError) -> None:
        self._event(decode_pb2.DecodeEvent(handed_back=decode_pb2.HandoffLost(cause=error_to_detail(error))))

    def fail(self, error: KvRelayError) -> None:
        self._event(decode_pb2.DecodeEvent(failed=error_to_detail(error)))

    def _event(self, event: decode_pb2.DecodeEvent) -> None:
        handle_event = decode_pb2.DecodeHandleEvent(handle=self.handle, event=event)
        self._wire.send(decode_pb2.DecodeServiceSessionResponse(event=handle_event))


async def prefill_well(call: PrefillCall) -> None:
    call.accept()
    call.finish()


async def decode_well(call: DecodeCall) -> None:
    """Echoes the first position and generates up to max_tokens."""
    call.accept()
    most = call.generation.sampling.max_tokens
    for choice in call.generation.choices:
        call.generate(len(choice.committed), most, choice.index)
        call.end(most, choice.index)


class FakeWorker(ABC, Generic[Call]):
    """`start()`, `stop()`. A worker that is started again on its port has a new epoch, as a real one."""

    role: worker_pb2.Role.ValueType

    def __init__(self, worker_id: str, behaviour: Callable[[Call], Awaitable[None]] | None = None) -> None:
        """Without a behaviour the test answers each call, see `next_call`."""
        self.worker_id = worker_id
        self.behaviour = behaviour
        self.fingerprint = b"model"
        self.layout = common_pb2.KvLayout(dtype="float32", num_layers=2, block_tokens=64, hash_unit_tokens=64)
        self.decode_alone_tokens = 0
        self.num_sessions = 0
        self.tls: TlsFiles | None = None
        self.loads: asyncio.Queue[worker_pb2.WatchLoadResponse] = asyncio.Queue()  # reports to be sent
        self.calls: dict[int, Call] = {}
        self._starts = 0
        self._port = 0
        self._wire = _Wire()
        self._streams: set[asyncio.Task[Any]] = set()
        self._new_calls: asyncio.Queue[Call] = asyncio.Queue()
        self._behaving: set[asyncio.Future[None]] = set()
        self._server: RpcServer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        self._starts += 1
        self._server = RpcServer("127.0.0.1", self._port, tls=self.tls)
        add_WorkerServiceServicer_to_server(_Describing(self), self._server.server)
        self._add_to(self._server)
        self._port = await self._server.start()

    async def stop(self) -> None:
        """At once, as if killed."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None
        for task in self._behaving:
            task.cancel()
        await asyncio.gather(*self._behaving, return_exceptions=True)
        self.calls.clear()

    async def drop_session(self) -> None:
        """Ends the session's stream; the worker and its calls live on."""
        for task in list(self._streams):
            task.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    async def next_call(self, timeout_s: float = 5.0) -> Call:
        async with asyncio.timeout(timeout_s):
            return await self._new_calls.get()

    @property
    def num_waiting_calls(self) -> int:
        return self._new_calls.qsize()

    def describe(self) -> worker_pb2.DescribeResponse:
        return worker_pb2.DescribeResponse(
            worker=common_pb2.WorkerRef(worker_id=self.worker_id, address=self.address),
            role=self.role,
            engine_epoch=self._epoch(),
            model_fingerprint=self.fingerprint,
            layouts=[self.layout],
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            decode_alone_tokens=self.decode_alone_tokens,
        )

    def welcome(self) -> prefill_pb2.SessionWelcome:
        return prefill_pb2.SessionWelcome(worker_id=self.worker_id, engine_epoch=self._epoch())

    def _epoch(self) -> bytes:
        return f"{self.worker_id}/{self._starts}".encode()

    async def serve_session(self, requests: AsyncIterator[Any], welcome: Any) -> AsyncIterator[Any]:
        """The body of the Session handler."""
        outgoing: asyncio.Queue[Any] = asyncio.Queue()
        reader = asyncio.get_running_loop().create_task(self._read(requests, outgoing, welcome))
        self._streams.add(reader)
        reader.add_done_callback(lambda _: outgoing.put_nowait(None))
        try:
            while (message := await outgoing.get()) is not None:
                yield message
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._streams.discard(reader)
        raise WorkerLostError("the fake worker dropped its session")

    async def _read(self, requests: AsyncIterator[Any], outgoing: asyncio.Queue[Any], welcome: Any) -> None:
        async for request in requests:
            if request.HasField("hello"):
                self.num_sessions += 1
                self._wire.outgoing = outgoing
                outgoing.put_nowait(welcome)
            else:
                self._take(request)

    def _opened(self, handle: int, call: Call) -> None:
        if handle in self.calls:
            self.calls[handle].reopen()
            return
        self.calls[handle] = call
        if self.behaviour is None:
            self._new_calls.put_nowait(call)
        else:
            task = asyncio.ensure_future(self.behaviour(call))
            self._behaving.add(task)
            task.add_done_callback(self._behaving.discard)

    @abstractmethod
    def _add_to(self, server: RpcServer) -> None: ...

    @abstractmethod
    def _take(self, request: Any) -> None:
        """One message of the router."""


class FakePrefill(FakeWorker[PrefillCall]):
    role = worker_pb2.ROLE_PREFILL

    def _add_to(self, server: RpcServer) -> None:
        add_PrefillServiceServicer_to_server(_PrefillSessions(self), server.server)

    def _take(self, request: prefill_pb2.PrefillServiceSessionRequest) -> None:
        match request.WhichOneof("message"):
            case "open":
                self._opened(request.open.handle, PrefillCall(self._wire, request.open))
            case "cancel":
                self.calls[request.cancel.handle].cancelled.set()
            case "release":
                self.calls[request.release.handle].released.set()


class FakeDecode(FakeWorker[DecodeCall]):
    role = worker_pb2.ROLE_DECODE

    def step(self, positions: Mapping[DecodeCall, int]) -> None:
        """The token at each position of choice 0, all in one message as of one engine step."""
        step = decode_pb2.StepTokens(
            handles=[call.handle for call in positions],
            choices=[0] * len(positions),
            positions=positions.values(),
            token_ids=[token_of(0, position) for position in positions.values()],
        )
        self._wire.send(decode_pb2.DecodeServiceSessionResponse(tokens=step))

    def _add_to(self, server: RpcServer) -> None:
        add_DecodeServiceServicer_to_server(_DecodeSessions(self), server.server)

    def _take(self, request: decode_pb2.DecodeServiceSessionRequest) -> None:
        match request.WhichOneof("message"):
            case "open":
                call = DecodeCall(self._wire, request.open.handle, request.open.start)
                self._opened(call.handle, call)
            case "resume":
                self.calls[request.resume.handle].resumes.put_nowait(request.resume.resume)
            case "abort":
                call = self.calls[request.abort.handle]
                call.abort_reason = request.abort.reason
                call.aborted.set()
            case "abort_choices":
                choices = list(request.abort_choices.abort_choices.choices)
                self.calls[request.abort_choices.handle].aborted_choices.put_nowait(choices)
            case "reattach":
                needed = dict(request.reattach.next_positions)
                self.calls[request.reattach.handle].reattached.put_nowait(needed)


class _Describing(WorkerServiceServicer):
    def __init__(self, worker: FakeWorker[Any]) -> None:
        self._worker = worker

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DescribeResponse:
        return self._worker.describe()

    async def WatchLoad(self, request: worker_pb2.WatchLoadRequest, context: Any) -> AsyncIterator[Any]:
        while True:
            yield await self._worker.loads.get()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        raise UnsupportedError("a fake worker does not drain")


class _PrefillSessions(PrefillServiceServicer):
    def __init__(self, worker: FakePrefill) -> None:
        self._worker = worker

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        welcome = prefill_pb2.PrefillServiceSessionResponse(welcome=self._worker.welcome())
        async for message in self._worker.serve_session(request_iterator, welcome):
            yield message

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> AsyncIterator[Any]:
        raise UnsupportedError("a fake worker serves sessions only")
        yield


class _DecodeSessions(DecodeServiceServicer):
    def __init__(self, worker: FakeDecode) -> None:
        self._worker = worker

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        welcome = decode_pb2.DecodeServiceSessionResponse(welcome=self._worker.welcome())
        async for message in self._worker.serve_session(request_iterator, welcome):
            yield message

    async def Decode(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        raise UnsupportedError("a fake worker serves sessions only")
        yield
