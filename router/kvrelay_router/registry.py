"""The workers that this router knows: a static list of addresses, a session with each, and one common model.

A worker whose weights or KV layout differ from those of the workers that serve is kept out until it fits.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from kvrelay.v1 import worker_pb2
from kvrelay_core.errors import MismatchError, UnavailableError
from kvrelay_router.decode_session import DecodeSession
from kvrelay_router.prefill_session import PrefillSession
from kvrelay_router.worker_session import WorkerSession, WorkerState

log = logging.getLogger(__name__)

_ROLES = {"prefill": worker_pb2.ROLE_PREFILL, "decode": worker_pb2.ROLE_DECODE}
_UP = (WorkerState.SERVING, WorkerState.DRAINING)


class ServedModel(Struct, frozen=True):
    """What every serving worker can do."""

    fingerprint: bytes
    vocab_size: int
    max_model_len: int


class Registry:
    def __init__(self, router_id: str, prefill: Sequence[str], decode: Sequence[str], *, reattach_s: float) -> None:
        handles = itertools.count(1)
        common: tuple[Any, ...] = (router_id, handles, self._admit, self._notify)
        self.prefill = {address: PrefillSession(address, *common) for address in prefill}
        self.decode = {address: DecodeSession(address, *common, reattach_s=reattach_s) for address in decode}
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def sessions(self) -> tuple[WorkerSession, ...]:
        return (*self.prefill.values(), *self.decode.values())

    @property
    def is_ready(self) -> bool:
        """At least one worker of each role serves."""
        return any(s.is_serving for s in self.prefill.values()) and any(s.is_serving for s in self.decode.values())

    @property
    def num_open(self) -> int:
        """Requests open at workers."""
        return sum(session.num_open for session in self.sessions)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(session.run(), name=f"session {session.key}") for session in self.sessions]

    async def close(self) -> None:
        """Ends every session; requests that are still open are told that they are lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def wait_changed(self) -> None:
        """Until the state of some worker changes."""
        self._changed.clear()
        await self._changed.wait()

    async def wait_ready(self) -> None:
        while not self.is_ready:
            await self.wait_changed()

    def model(self) -> ServedModel:
        """Raises UnavailableError while no worker serves."""
        up = [session.description for session in self.sessions if session.state in _UP]
        if not up:
            raise UnavailableError("no worker serves yet; try again in a moment")
        return ServedModel(
            fingerprint=up[0].model_fingerprint,
            vocab_size=min(description.vocab_size for description in up),
            max_model_len=min(description.max_model_len for description in up),
        )

    def _notify(self) -> None:
        self._changed.set()

    def _admit(self, session: WorkerSession, description: worker_pb2.DescribeResponse) -> None:
        if description.role != _ROLES[session.role]:
            raise MismatchError(
                f"{session.key} is listed as a {session.role} worker but has the role "
                f"{worker_pb2.Role.Name(description.role)}; correct the router's list"
            )
        for other in self.sessions:
            if other is not session and other.state in _UP:
                _require_same_model(session.key, description, other)
                return


def _require_same_model(key: str, description: worker_pb2.DescribeResponse, other: WorkerSession) -> None:
    known = other.description
    if description.model_fingerprint != known.model_fingerprint:
        raise MismatchError(
            f"worker {key} has another model than {other.worker_id} "
            f"(fingerprint {description.model_fingerprint.hex()[:16]} against {known.model_fingerprint.hex()[:16]}); "
            "start both with the same checkpoint and dtype"
        )
    if list(description.layouts) != list(known.layouts):
        raise MismatchError(
            f"worker {key} has another KV layout than {other.worker_id}; start both with the same --block-tokens"
        )
