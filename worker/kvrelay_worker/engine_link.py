"""The service's view of its engine process: commands go in, events come out to the handlers of their type.

`EngineClient` is the real one (a subprocess); tests use one in the process. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvrelay_core.errors import (
    DeadlineError,
    HandoffError,
    InternalError,
    KvRelayError,
    UnavailableError,
    WorkerLostError,
)
from kvrelay_engine import messages
from kvrelay_engine.config import EngineConfig

log = logging.getLogger(__name__)

E = TypeVar("E", bound=messages.Event)
T = TypeVar("T")


class EngineLink(ABC):
    """Handlers are called in the order of the events, on the event loop, and must not block. One that raises is a
    bug that has left its bookkeeping in an unknown state: the engine counts as lost, and the worker starts anew."""

    def __init__(self) -> None:
        self._handlers: defaultdict[type[messages.Event], list[Callable[[Any], None]]] = defaultdict(list)
        self._loss_handlers: list[Callable[[KvRelayError], None]] = []
        self._silence_handlers: list[Callable[[KvRelayError], None]] = []
        self._started: messages.Started | None = None
        self.load = messages.Load()  # as the latest beat told it
        self.loss: KvRelayError | None = None
        self.silence: KvRelayError | None = None  # it stands still, as far as is known

    @abstractmethod
    async def start(self, make_config: Callable[[str, str], EngineConfig], timeout_s: float) -> messages.Started:
        """Starts an engine with `make_config(commands_endpoint, events_endpoint)`; returns when it is ready.

        Raises the engine's own error, WorkerLostError when it exits first, DeadlineError after `timeout_s`.
        """

    @abstractmethod
    async def stop(self) -> None:
        """Ends the engine and frees what belongs to it. Idempotent."""

    @abstractmethod
    def send(self, command: messages.EngineCommand) -> None:
        """Never blocks. Raises WorkerLostError when the engine is gone."""

    def notify(self, command: messages.EngineCommand) -> None:
        """Sends what does not matter any more once the engine is gone, such as the end of a stream."""
        with contextlib.suppress(WorkerLostError):
            self.send(command)

    def on(self, event_type: type[E], handler: Callable[[E], None]) -> None:
        self._handlers[event_type].append(handler)

    def on_loss(self, handler: Callable[[KvRelayError], None]) -> None:
        """Called once, when the engine died or hangs."""
        self._loss_handlers.append(handler)

    def on_silence(self, handler: Callable[[KvRelayError], None]) -> None:
        """Called each time that the engine has stood still for as long as a lease lasts. It may still come back."""
        self._silence_handlers.append(handler)

    @property
    def started(self) -> messages.Started:
        """What the engine said of itself. Raises UnavailableError while it is starting, or when it is lost."""
        if self.loss is not None:
            raise self.loss
        if self._started is None:
            raise UnavailableError("the engine is still loading its model; try again soon")
        return self._started

    def check_moving(self) -> None:
        """Raises the error of an engine that is lost, or has stood still for as long as a lease lasts."""
        error = self.loss or self.silence
        if error is not None:
            raise error

    def dispatch(self, event: messages.EngineEvent) -> None:
        self.silence = None
        if isinstance(event, messages.Started):
            self._started = event
        elif isinstance(event, messages.Beat):
            self.load = event.load
        try:
            for handler in self._handlers[type(event)]:
                handler(event)
        except Exception as error:
            name = type(event).__name__
            log.exception("the service could not take a %s of its engine", name)
            self.declare_lost(InternalError(f"unexpected {type(error).__name__} at a {name}; see the worker's log"))

    def declare_silent(self, silent_s: float) -> None:
        self.silence = error = HandoffError(f"the engine of the source has not moved for {silent_s:.1f} s")
        log.warning("the engine has not moved for %.1f s; those who wait for it are told", silent_s)
        for handler in self._silence_handlers:
            handler(error)

    def declare_lost(self, error: KvRelayError) -> None:
        if self.loss is not None:
            return
        self.loss = error
        for handler in self._loss_handlers:
            try:
                handler(error)
            except Exception:
                log.exception("a part of the service could not take the loss of its engine")


class PendingCalls(Generic[T]):
    """Commands that the engine answers, by call number."""

    def __init__(self, engine: EngineLink) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)
        self._futures: dict[int, asyncio.Future[T]] = {}
        engine.on_loss(self.fail_all)

    def __len__(self) -> int:
        return len(self._futures)

    async def ask(self, make_command: Callable[[int], messages.EngineCommand], timeout_s: float) -> T:
        """Sends the command for a new call number and awaits the answer; DeadlineError after `timeout_s`."""
        number = next(self._numbers)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._futures[number] = future
        try:
            self._engine.send(make_command(number))
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise DeadlineError(f"the engine did not answer within {timeout_s:g} s") from error
        finally:
            del self._futures[number]

    def answer(self, number: int, value: T) -> None:
        future = self._futures.get(number)
        if future is not None and not future.done():
            future.set_result(value)

    def fail_all(self, error: KvRelayError) -> None:
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error)
