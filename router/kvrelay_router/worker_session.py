"""One multiplexed Session with one worker: connect, wait until it has loaded, read, write, and come back after a loss.

What prefill and decode sessions share. A worker goes on while its transport is lost: within `reattach_s` the router
comes back to the same engine and names its requests again (PROTOCOL B3, C7). Later, or when the engine restarted
meanwhile, they are lost. Reading never waits for anybody: events go to listeners by plain calls. Writing goes through
a bounded queue; a worker that does not read loses its session. Knows nothing of what requests are.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import grpc

from kvrelay.v1 import worker_pb2_grpc
from kvrelay.v1.prefill_pb2 import SessionWelcome
from kvrelay.v1.worker_pb2 import DESCRIPTOR, DescribeRequest, DescribeResponse, WatchLoadRequest, WatchLoadResponse
from kvrelay_core.errors import KvRelayError, MismatchError, UnavailableError, WorkerLostError
from kvrelay_core.rpc.channel import TlsFiles, open_channel
from kvrelay_core.rpc.health import wait_serving
from kvrelay_core.rpc.status import error_from_rpc

log = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 16384
CONNECT_TIMEOUT_S = 5.0
LOADING_TIMEOUT_S = 60.0  # of a worker that answers; then it is connected anew
WRITE_TIMEOUT_S = 5.0
LOAD_INTERVAL_S = 1.0
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
# While requests wait to be named again, the worker may answer at any moment.
REATTACH_TIMEOUT_S = 1.0
REATTACH_BACKOFF_S = 0.2

_WORKER_SERVICE = DESCRIPTOR.services_by_name["WorkerService"].full_name

Entry = TypeVar("Entry")


class WorkerState(Enum):
    CONNECTING = "connecting"
    SERVING = "serving"
    DRAINING = "draining"  # takes nothing new; what runs goes on
    REFUSED = "refused"  # connected, but of another model or role
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """What all sessions of a router have in common."""

    router_id: str
    handles: Iterator[int]  # never repeats
    reattach_s: float
    tls: TlsFiles | None
    admit: Callable[[WorkerSession[Any], DescribeResponse], None]  # raises MismatchError to keep a worker out
    on_change: Callable[[], None]  # of some worker's state
    on_load: Callable[[WorkerSession[Any]], None]


class WorkerSession(ABC, Generic[Entry]):
    """`run()` lives as long as the router; `key` is the worker's address. An `Entry` is one open request."""

    role: str
    _last_words: frozenset[str]  # kinds of message after which the router knows nothing of a handle any more

    def __init__(self, address: str, terms: SessionTerms) -> None:
        self.key = address
        self.state = WorkerState.CONNECTING
        self.description = DescribeResponse()
        self.load: WatchLoadResponse | None = None  # as of its latest report; None: not connected
        self._terms = terms
        self._open: dict[int, Entry] = {}
        self._outgoing: deque[Any] = deque()
        self._outgoing_changed = asyncio.Event()
        self._unsent: list[Any] = []  # last words that wait for the connection: at most one for each open request
        self._epoch = b""  # of the last welcome
        self._giving_up: asyncio.TimerHandle | None = None

    @property
    def worker_id(self) -> str:
        return self.description.worker.worker_id or self.key

    @property
    def is_serving(self) -> bool:
        return self.state is WorkerState.SERVING

    @property
    def is_up(self) -> bool:
        return self.state in (WorkerState.SERVING, WorkerState.DRAINING)

    @property
    def num_open(self) -> int:
        """Handles in use."""
        return len(self._open)

    def forget(self, handle: int) -> None:
        """The worker holds nothing of the handle any more."""
        self._open.pop(handle, None)

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
    def _reattach(self, handle: int, entry: Entry) -> None:
        """The session is there again: names one open request to the worker."""

    @abstractmethod
    def _last_word(self, handle: int, entry: Entry) -> Any:
        """The message that ends an open request at the worker."""

    @abstractmethod
    def _tell_lost(self, entry: Entry, error: KvRelayError) -> None: ...

    # --------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Connects again and again; ends by being cancelled, and then every listener has been told."""
        backoff_s = FIRST_BACKOFF_S
        try:
            while True:
                was_up = False
                try:
                    await self._serve_once()
                except KvRelayError as error:
                    was_up = self.is_up
                    self._lose_session(error)
                backoff_s = FIRST_BACKOFF_S if was_up else min(2 * backoff_s, MAX_BACKOFF_S)
                await asyncio.sleep(min(backoff_s, REATTACH_BACKOFF_S) if self._open else backoff_s)
        finally:
            self._lose_requests(WorkerLostError("the router stops"))

    async def _serve_once(self) -> None:
        """With a channel of its own: one that has failed before would keep to its back-off."""
        timeout_s = REATTACH_TIMEOUT_S if self._open else CONNECT_TIMEOUT_S
        channel = open_channel(self.key, self._terms.tls)
        try:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            description = await self._describe(channel, stub, timeout_s)
            self._terms.admit(self, description)
            self.description = description
            call = self._open_stream(channel)
            try:
                await self._handshake(call, timeout_s)
                await self._exchange(call, stub)
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, self._name) from error
        except (KvRelayError, asyncio.CancelledError):
            raise
        except TimeoutError as error:
            raise WorkerLostError(f"{self._name} did not answer in time", peer=self.key) from error
        except Exception as error:
            log.exception("the session with %s broke", self._name)
            raise WorkerLostError(f"the session with {self._name} broke; see the log", peer=self.key) from error
        finally:
            await channel.close()

    async def _describe(
        self, channel: grpc.aio.Channel, stub: worker_pb2_grpc.WorkerServiceAsyncStub, timeout_s: float
    ) -> DescribeResponse:
        """Waits for as long as the worker loads its model; raises what it answers instead, or the loss."""
        try:
            return await stub.Describe(DescribeRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            typed = error_from_rpc(error, self._name)
            if isinstance(typed, WorkerLostError) or not isinstance(typed, UnavailableError):
                raise
            log.debug("%s: %s", self._name, typed.message)
        async with asyncio.timeout(LOADING_TIMEOUT_S):
            await wait_serving(channel, _WORKER_SERVICE)
        return await stub.Describe(DescribeRequest(), timeout=timeout_s)

    async def _handshake(self, call: Any, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            await call.write(self._hello(self._terms.router_id))
            response = await call.read()
        welcome = None if response is grpc.aio.EOF else self._welcome_of(response)
        if welcome is None:
            raise WorkerLostError(f"{self._name} did not begin its session with a welcome", peer=self.key)
        is_same_engine = welcome.engine_epoch == self._epoch
        self._epoch = welcome.engine_epoch
        # Once more: another worker may have come up, with another model, while this one introduced itself.
        self._terms.admit(self, self.description)
        log.info("%s worker %s (%s) serves", self.role, self.worker_id, self.key)
        self.state = WorkerState.SERVING
        self._stop_giving_up()
        self._come_back(is_same_engine)
        self._terms.on_change()  # now it may get new requests

    async def _exchange(self, call: Any, stub: Any) -> None:
        """Reads, writes and watches the load until one of them ends."""
        parts = (self._read(call), self._write(call), self._watch_load(stub))
        tasks = [asyncio.get_running_loop().create_task(part, name=f"session {self.key}") for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in (task for task in tasks if task in done):  # the reader's reason first
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        raise WorkerLostError(f"{self._name} closed its session", peer=self.key)

    async def _read(self, call: Any) -> None:
        while (response := await call.read()) is not grpc.aio.EOF:
            self._receive(response)

    async def _write(self, call: Any) -> None:
        while True:
            while self._outgoing:
                if len(self._outgoing) > MAX_QUEUED_MESSAGES:
                    raise WorkerLostError(f"{self._name} is {len(self._outgoing)} messages behind", peer=self.key)
                try:
                    async with asyncio.timeout(WRITE_TIMEOUT_S):
                        await call.write(self._outgoing.popleft())
                except asyncio.InvalidStateError:
                    await call.code()  # it has ended; the reader says why
                    return
            self._outgoing_changed.clear()
            await self._outgoing_changed.wait()

    async def _watch_load(self, stub: Any) -> None:
        """A worker that cannot tell is served all the same; whether it lives is the session's business."""
        while True:
            try:
                async for load in stub.WatchLoad(WatchLoadRequest(interval_s=LOAD_INTERVAL_S)):
                    self._note_load(load)
            except grpc.aio.AioRpcError as error:
                log.debug("%s does not tell its load: %s", self._name, error.details())
            await asyncio.sleep(LOAD_INTERVAL_S)

    # ---------------------------------------------------------------------------- loss and return

    def _lose_session(self, error: KvRelayError) -> None:
        is_refused = isinstance(error, MismatchError)
        self._log_loss(error, is_refused)
        self._unsent += [message for message in self._outgoing if message.WhichOneof("message") in self._last_words]
        self._outgoing.clear()
        self._set_state(WorkerState.REFUSED if is_refused else WorkerState.LOST)
        self._note_load(None)
        if is_refused:
            self._lose_requests(error)
        elif self._open and self._giving_up is None:
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(self._terms.reattach_s, self._give_up, error)

    def _give_up(self, error: KvRelayError) -> None:
        self._unsent += [self._last_word(handle, entry) for handle, entry in self._open.items()]
        self._lose_requests(error)

    def _come_back(self, is_same_engine: bool) -> None:
        unsent, self._unsent = self._unsent, []
        if not is_same_engine:
            message = f"{self.role} worker {self.worker_id} restarted, and the request is lost"
            self._lose_requests(WorkerLostError(message, peer=self.key))
            return
        for message in unsent:
            self._send(message)
        for handle, entry in list(self._open.items()):
            self._reattach(handle, entry)

    def _lose_requests(self, error: KvRelayError) -> None:
        self._stop_giving_up()
        lost, self._open = self._open, {}
        for entry in lost.values():
            self._tell_lost(entry, error)

    def _stop_giving_up(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    # ------------------------------------------------------------------------------------- helpers

    @property
    def _name(self) -> str:
        return f"{self.role} worker {self.key}"

    def _begin(self, entry: Entry) -> int:
        """A handle for a new request. Raises UnavailableError when the worker does not serve now: nothing was sent."""
        if not self.is_serving:
            raise UnavailableError(f"{self.role} worker {self.worker_id} is {self.state.value}", peer=self.key)
        handle = next(self._terms.handles)
        self._open[handle] = entry
        return handle

    def _end(self, handle: int, message: Any) -> None:
        """The last word on a handle: sent now, or when the session is there again."""
        del self._open[handle]
        if self.is_up:
            self._send(message)
        else:
            self._unsent.append(message)

    def _send(self, message: Any) -> None:
        """Queues the message; without a connection there is nobody to hear it."""
        if self.is_up:
            self._outgoing.append(message)
            self._outgoing_changed.set()

    def note_draining(self) -> None:
        """It gets no new requests until it comes back."""
        if self.is_serving:
            self._set_state(WorkerState.DRAINING)

    def _note_load(self, load: WatchLoadResponse | None) -> None:
        self.load = load
        if load is not None and load.draining:
            self.note_draining()
        self._terms.on_load(self)

    def _set_state(self, state: WorkerState) -> None:
        if state is not self.state:
            self.state = state
            self._terms.on_change()

    def _log_loss(self, error: KvRelayError, is_refused: bool) -> None:
        if self.is_up:
            log.warning("%s worker %s is lost: %s", self.role, self.worker_id, error.message)
        elif is_refused:
            level = logging.DEBUG if self.state is WorkerState.REFUSED else logging.ERROR
            log.log(level, "%s is kept out: %s", self._name, error.message)
        else:
            log.debug("%s: %s", self._name, error.message)
