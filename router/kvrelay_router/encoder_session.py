"""The connection to one encoder: describe, watch, call, and come back after a loss.

An encode is a call of its own that carries the media; there is nothing to come back to when the connection is lost.
Whoever asks owns the call and may cancel it; answers go to it by plain calls. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

import grpc

from kvrelay.v1 import worker_pb2_grpc
from kvrelay.v1.common_pb2 import EmbeddingTicket
from kvrelay.v1.encoder_pb2 import EncodeRequest, EncodeResponse
from kvrelay.v1.encoder_pb2_grpc import EncoderServiceStub
from kvrelay.v1.kv_source_pb2 import RELEASE_REASON_CANCELLED, ReleaseRequest
from kvrelay.v1.kv_source_pb2_grpc import KvSourceServiceStub
from kvrelay.v1.worker_pb2 import DescribeRequest, DescribeResponse, WatchLoadRequest
from kvrelay_core.errors import (
    DeadlineError,
    DrainingError,
    KvRelayError,
    MismatchError,
    UnavailableError,
    WorkerLostError,
)
from kvrelay_core.rpc.channel import TlsFiles, open_channel
from kvrelay_core.rpc.status import error_from_rpc
from kvrelay_router.worker_session import (
    CONNECT_TIMEOUT_S,
    FIRST_BACKOFF_S,
    LOAD_INTERVAL_S,
    MAX_BACKOFF_S,
    WorkerState,
)

log = logging.getLogger(__name__)

Answer = EncodeResponse | KvRelayError


class EncoderSession:
    """`run()` lives as long as the router; `key` is the encoder's address."""

    role = "encoder"

    def __init__(
        self,
        address: str,
        tls: TlsFiles | None,
        admit: Callable[[DescribeResponse], None],
        on_change: Callable[[], None],
    ) -> None:
        """`admit` raises MismatchError to keep the encoder out; `on_change` hears of every change of state."""
        self.key = address
        self.state = WorkerState.CONNECTING
        self.description = DescribeResponse()
        self._tls = tls
        self._admit = admit
        self._on_change = on_change
        self._channel: grpc.aio.Channel | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def is_serving(self) -> bool:
        return self.state is WorkerState.SERVING

    @property
    def num_open(self) -> int:
        """Calls that have not ended."""
        return len(self._calls) + len(self._releases)

    # --------------------------------------------------------------------------------------- calls

    def encode(self, request: EncodeRequest, timeout_s: float, done: Callable[[Answer], None]) -> Callable[[], None]:
        """Calls `done` once, later, with the answer or the error, unless it is cancelled before.

        Returns what cancels the call. Raises UnavailableError when the encoder does not serve now: nothing was sent.
        """
        if not self.is_serving or self._channel is None:
            raise UnavailableError(f"encoder {self.key} is {self.state.value}", peer=self.key)
        stub = EncoderServiceStub(self._channel)
        call = self._call(stub.Encode(request, timeout=timeout_s), timeout_s, done)
        task = asyncio.get_running_loop().create_task(call, name=f"encode {self.key}")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

        def cancel() -> None:
            task.cancel()

        return cancel

    async def _call(self, call: grpc.aio.UnaryUnaryCall, timeout_s: float, done: Callable[[Answer], None]) -> None:  # type: ignore[type-arg]
        try:
            answer: Answer = await call
        except grpc.aio.AioRpcError as error:
            answer = self._error_of(error, timeout_s)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                await self._release_unheard(call)
                raise
            # The channel was closed under it, which gRPC tells in the same way.
            answer = WorkerLostError(f"encoder {self.key} is lost", peer=self.key)
        finally:
            call.cancel()
        done(answer)

    async def _release_unheard(self, call: grpc.aio.UnaryUnaryCall) -> None:  # type: ignore[type-arg]
        """Tickets of an answer that crossed with the cancel."""
        if call.done() and not call.cancelled():
            with contextlib.suppress(grpc.aio.AioRpcError):
                self.release((await call).tickets)

    def release(self, tickets: Iterable[EmbeddingTicket]) -> None:
        """Gives pins back, in the background. Where that fails they go with their leases."""
        if self._channel is None:
            return
        stub = KvSourceServiceStub(self._channel)
        for ticket in tickets:
            request = ReleaseRequest(embedding_ticket=ticket, reason=RELEASE_REASON_CANCELLED)
            call = self._release(stub.Release(request, timeout=CONNECT_TIMEOUT_S))
            task = asyncio.get_running_loop().create_task(call, name=f"release {self.key}")
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def _release(self, call: grpc.aio.UnaryUnaryCall) -> None:  # type: ignore[type-arg]
        try:
            await call
        except grpc.aio.AioRpcError as error:
            log.debug("a ticket was not released at encoder %s: %s", self.key, error.details())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # else the channel was closed under it

    def _error_of(self, error: grpc.aio.AioRpcError, timeout_s: float) -> KvRelayError:
        typed = error_from_rpc(error, f"encoder {self.key}")
        if self.is_serving and isinstance(typed, DrainingError):
            self._set_state(WorkerState.DRAINING)
        elif self.is_serving and isinstance(typed, WorkerLostError):
            self._set_state(WorkerState.LOST)  # until its reports say otherwise
        if isinstance(typed, DeadlineError):  # the call's: the request's own ends it from outside
            return UnavailableError(f"encoder {self.key} did not answer within {timeout_s:g} s", peer=self.key)
        return typed

    # --------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Connects again and again; ends by being cancelled, and then no call is left."""
        backoff_s = FIRST_BACKOFF_S
        try:
            while True:
                was_up = False
                try:
                    await self._serve_once()
                except KvRelayError as error:
                    was_up = self.is_serving
                    self._lose(error)
                backoff_s = FIRST_BACKOFF_S if was_up else min(2 * backoff_s, MAX_BACKOFF_S)
                await asyncio.sleep(backoff_s)
        finally:
            await self._cancel_calls()

    async def _serve_once(self) -> None:
        """Serves as long as the encoder tells its load; always raises."""
        channel = open_channel(self.key, self._tls)
        try:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            description = await stub.Describe(DescribeRequest(), timeout=CONNECT_TIMEOUT_S, wait_for_ready=True)
            self._admit(description)
            self.description, self._channel = description, channel
            while await self._watch(stub):
                log.debug("encoder %s is long at one step", self.key)
            raise WorkerLostError(f"encoder {self.key} ended its reports", peer=self.key)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"encoder {self.key}") from error
        except (KvRelayError, asyncio.CancelledError):
            raise
        except Exception as error:
            log.exception("the connection to encoder %s broke", self.key)
            raise WorkerLostError(f"the connection to encoder {self.key} broke; see the log", peer=self.key) from error
        finally:
            self._channel = None
            await channel.close()  # its calls end with an error each

    async def _watch(self, stub: worker_pb2_grpc.WorkerServiceAsyncStub) -> bool:
        """Until the reports end; True: because its engine computes, and does not tell its load meanwhile. That is no
        loss: a large image takes what it takes, and an engine that hangs is its service's business."""
        try:
            async for load in stub.WatchLoad(WatchLoadRequest(interval_s=LOAD_INTERVAL_S)):
                self._set_state(WorkerState.DRAINING if load.draining else WorkerState.SERVING)
        except grpc.aio.AioRpcError as error:
            if not isinstance(error_from_rpc(error, f"encoder {self.key}"), DeadlineError):
                raise
            return True
        return False

    def _lose(self, error: KvRelayError) -> None:
        is_refused = isinstance(error, MismatchError)
        level = logging.ERROR if is_refused else logging.WARNING if self.is_serving else logging.DEBUG
        log.log(level, "encoder %s is %s: %s", self.key, "kept out" if is_refused else "lost", error.message)
        self._set_state(WorkerState.REFUSED if is_refused else WorkerState.LOST)

    def _set_state(self, state: WorkerState) -> None:
        if state is not self.state:
            if state is WorkerState.SERVING:
                log.info("encoder worker %s (%s) serves", self.description.worker.worker_id, self.key)
            self.state = state
            self._on_change()

    async def _cancel_calls(self) -> None:
        calls = [*self._calls, *self._releases]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
