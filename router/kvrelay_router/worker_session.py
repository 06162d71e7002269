"""One multiplexed Session with one worker: connect, describe, read, write, and come back after a loss.

What prefill and decode sessions share. Reading never waits for anybody: events go to listeners by plain calls.
Writing goes through a bounded queue; a worker that does not read loses its session. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import grpc

from kvrelay.v1.prefill_pb2 import SessionWelcome
from kvrelay.v1.worker_pb2 import DescribeRequest, DescribeResponse
from kvrelay.v1.worker_pb2_grpc import WorkerServiceStub
from kvrelay_core.errors import KvRelayError, MismatchError, WorkerLostError
from kvrelay_core.rpc.channel import open_channel
from kvrelay_core.rpc.status import error_from_rpc

log = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 16384
CONNECT_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0


class WorkerState(Enum):
    CONNECTING = "connecting"
    SERVING = "serving"
    DRAINING = "draining"  # takes nothing new; what runs goes on
    REFUSED = "refused"  # connected, but of another model or role
    LOST = "lost"


class WorkerSession(ABC):
    """`run()` lives as long as the router; `key` is the worker's address."""

    role: str

    def __init__(
        self,
        address: str,
        router_id: str,
        handles: Iterator[int],
        admit: Callable[[WorkerSession, DescribeResponse], None],
        on_change: Callable[[], None],
    ) -> None:
        """`handles` never repeats within a router. `admit` raises MismatchError to keep a worker out."""
        self.key = address
        self.state = WorkerState.CONNECTING
        self.description = DescribeResponse()
        self._router_id = router_id
        self._handles = handles
        self._admit = admit
        self._on_change = on_change
        self._channel: grpc.aio.Channel | None = None
        self._outgoing: deque[Any] = deque()
        self._outgoing_changed = asyncio.Event()
        self._epoch = b""  # of the last welcome

    @property
    def worker_id(self) -> str:
        return self.description.worker.worker_id or self.key

    @property
    def is_serving(self) -> bool:
        return self.state is WorkerState.SERVING

    @property
    @abstractmethod
    def num_open(self) -> int:
        """Handles in use."""

    # ------------------------------------------------------------------------- what the roles add

    @abstractmethod
    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        """Starts the role's Session call."""

    @abstractmethod
    def _hello(self, router_id: str) -> Any: ...

    @abstractmethod
    def _welcome_of(self, response: Any) -> SessionWelcome | None: ...

    @abstractmethod
    def _receive(self, response: Any) -> None:
        """Hands one message to its listeners."""

    @abstractmethod
    def _connected(self, same_engine: bool) -> None:
        """The session is (again) there; `same_engine`: the engine did not restart since the last one."""

    @abstractmethod
    def _disconnected(self, error: KvRelayError) -> None: ...

    @abstractmethod
    def _lose_all(self, error: KvRelayError) -> None:
        """Tells every listener that its request is lost."""

    # --------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Connects again and again; ends by being cancelled, and then every listener has been told."""
        backoff_s = FIRST_BACKOFF_S
        try:
            while True:
                try:
                    await self._serve_once()
                except KvRelayError as error:
                    was_up = self.state in (WorkerState.SERVING, WorkerState.DRAINING)
                    self._log_loss(error, was_up)
                    refused = isinstance(error, MismatchError)
                    self._outgoing.clear()
                    self._set_state(WorkerState.REFUSED if refused else WorkerState.LOST)
                    self._disconnected(error)
                    backoff_s = FIRST_BACKOFF_S if was_up else min(2 * backoff_s, MAX_BACKOFF_S)
                await asyncio.sleep(backoff_s)
        finally:
            self._lose_all(WorkerLostError("the router stops"))
            if self._channel is not None:
                await self._channel.close()

    async def _serve_once(self) -> None:
        if self._channel is None:
            self._channel = open_channel(self.key)
        try:
            await self._describe(self._channel)
            call = self._open_stream(self._channel)
            try:
                await self._handshake(call)
                await self._read_and_write(call)
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, f"{self.role} worker {self.key}") from error
        except (KvRelayError, asyncio.CancelledError):
            raise
        except TimeoutError as error:
            raise WorkerLostError(f"{self.role} worker {self.key} did not answer in {CONNECT_TIMEOUT_S} s") from error
        except Exception as error:
            log.exception("the session with %s worker %s broke", self.role, self.key)
            raise WorkerLostError(f"the session with {self.role} worker {self.key} broke; see the log") from error

    async def _describe(self, channel: grpc.aio.Channel) -> None:
        stub = WorkerServiceStub(channel)
        description = await stub.Describe(DescribeRequest(), timeout=CONNECT_TIMEOUT_S, wait_for_ready=True)
        self._admit(self, description)
        self.description = description

    async def _handshake(self, call: Any) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await call.write(self._hello(self._router_id))
            response = await call.read()
        welcome = None if response is grpc.aio.EOF else self._welcome_of(response)
        if welcome is None:
            raise WorkerLostError(f"{self.role} worker {self.key} did not begin its session with a welcome")
        same_engine = welcome.engine_epoch == self._epoch
        self._epoch = welcome.engine_epoch
        log.info("%s worker %s (%s) serves", self.role, self.worker_id, self.key)
        self._set_state(WorkerState.SERVING)
        self._connected(same_engine)

    async def _read_and_write(self, call: Any) -> None:
        writer = asyncio.get_running_loop().create_task(self._write(call), name=f"write {self.key}")
        # A writer that fails, by a full queue for one, ends the reader too.
        writer.add_done_callback(lambda _: call.cancel())
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                self._receive(response)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # it is the session itself that is cancelled, not only its call
        finally:
            writer.cancel()
            results = await asyncio.gather(writer, return_exceptions=True)
        if isinstance(results[0], KvRelayError):
            raise results[0]
        raise WorkerLostError(f"{self.role} worker {self.key} closed its session", peer=self.key)

    async def _write(self, call: Any) -> None:
        while True:
            while self._outgoing:
                if len(self._outgoing) > MAX_QUEUED_MESSAGES:
                    raise WorkerLostError(f"{self.role} worker {self.key} is {len(self._outgoing)} messages behind")
                await call.write(self._outgoing.popleft())
            self._outgoing_changed.clear()
            await self._outgoing_changed.wait()

    # ------------------------------------------------------------------------------------- helpers

    def _send(self, message: Any) -> None:
        """Queues the message; without a connection there is nobody to hear it."""
        if self.state in (WorkerState.SERVING, WorkerState.DRAINING):
            self._outgoing.append(message)
            self._outgoing_changed.set()

    def _require_serving(self) -> None:
        if not self.is_serving:
            raise WorkerLostError(f"{self.role} worker {self.worker_id} is {self.state.value}", peer=self.key)

    def note_draining(self) -> None:
        """The worker refused a request because it drains: it gets no new ones until it comes back."""
        if self.is_serving:
            self._set_state(WorkerState.DRAINING)

    def _set_state(self, state: WorkerState) -> None:
        if state is not self.state:
            self.state = state
            self._on_change()

    def _log_loss(self, error: KvRelayError, was_up: bool) -> None:
        if was_up:
            log.warning("%s worker %s is lost: %s", self.role, self.worker_id, error.message)
        elif isinstance(error, MismatchError):
            level = logging.DEBUG if self.state is WorkerState.REFUSED else logging.ERROR
            log.log(level, "%s worker %s is kept out: %s", self.role, self.key, error.message)
        else:
            log.debug("%s worker %s: %s", self.role, self.key, error.message)
