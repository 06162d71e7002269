"""Routers' sessions: many requests over one stream, and the grace in which a lost one may come back (PROTOCOL C7).

Knows nothing of the requests: who owns them is told when a session is gone for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, Protocol, TypeVar

from kvrelay.v1 import prefill_pb2
from kvrelay_core.errors import DeadlineError, InvalidRequestError, KvRelayError
from kvrelay_worker.outbox import Outbox
from kvrelay_worker.worker import Worker

M = TypeVar("M")


class SessionRequest(Protocol):
    """A request message of a Session stream."""

    @property
    def hello(self) -> prefill_pb2.SessionHello: ...


class Session(Generic[M]):
    """One stream of one router. `outbox` takes messages for as long as the stream lives, then drops them."""

    def __init__(self, router_id: str, outbox: Outbox[M]) -> None:
        self.router_id = router_id
        self.outbox = outbox


class SessionBook(Generic[M]):
    def __init__(self, worker: Worker, on_gone: Callable[[Session[M]], None], limit: int) -> None:
        """`limit` of messages that a router may be behind. `on_gone` is called once, after the grace."""
        self._worker = worker
        self._on_gone = on_gone
        self._limit = limit
        self._open: set[Session[M]] = set()
        worker.engine.on_loss(self.end_all)

    def __len__(self) -> int:
        return len(self._open)

    async def open(self, requests: AsyncIterator[SessionRequest]) -> Session[M]:
        """Begins with the router's `hello`. Raises UnavailableError while there is no engine to be welcomed by."""
        router_id = await self._read_hello(requests)
        _ = self._worker.engine.started
        # A router that is too far behind is lost at once, also while its transport still stands.
        session: Session[M] = Session(router_id, Outbox(self._limit, on_overflow=lambda: self.lose(session)))
        self._open.add(session)
        return session

    def lose(self, session: Session[M]) -> None:
        """The stream ended. Idempotent."""
        if session not in self._open:
            return
        self._open.remove(session)
        session.outbox.close()
        self._worker.tasks.spawn(self._expire(session), "session grace")

    async def _expire(self, session: Session[M]) -> None:
        await asyncio.sleep(self._worker.config.session_grace_s)
        self._on_gone(session)

    def end_all(self, error: KvRelayError) -> None:
        """Every stream ends with the error, after what is queued."""
        for session in self._open:
            session.outbox.close(error)

    async def _read_hello(self, requests: AsyncIterator[SessionRequest]) -> str:
        """The router's name, from the first message of a stream."""
        try:
            async with asyncio.timeout(self._worker.config.call_timeout_s):
                first = await anext(requests, None)
        except TimeoutError as error:
            raise DeadlineError("no `hello` came on the Session stream") from error
        if first is None or not first.hello.router_id:
            raise InvalidRequestError("the first message of a Session must be `hello` with a router_id")
        return first.hello.router_id

    def welcome(self) -> prefill_pb2.SessionWelcome:
        return prefill_pb2.SessionWelcome(
            worker_id=self._worker.config.worker_id, engine_epoch=self._worker.engine.started.engine_epoch
        )
