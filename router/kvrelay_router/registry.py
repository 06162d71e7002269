"""The workers that this router knows: a static list of addresses, a session with each, and one common model.

A worker whose weights or kind of KV differ from those of the workers that serve is kept out until it fits. Without a
prefill worker in the list, decode workers do everything.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec import Struct

from kvrelay.v1 import worker_pb2
from kvrelay_core.errors import MismatchError, UnavailableError
from kvrelay_core.rpc.channel import TlsFiles
from kvrelay_router.decode_session import DecodeSession
from kvrelay_router.encoder_session import EncoderSession
from kvrelay_router.prefill_session import PrefillSession
from kvrelay_router.worker_session import SessionTerms, WorkerSession, WorkerState

log = logging.getLogger(__name__)

_ROLES = {"prefill": worker_pb2.ROLE_PREFILL, "decode": worker_pb2.ROLE_DECODE, "encoder": worker_pb2.ROLE_ENCODER}


class ServedModel(Struct, frozen=True):
    """What every serving worker can do."""

    fingerprint: bytes
    vocab_size: int
    max_model_len: int


class Registry:
    def __init__(
        self,
        router_id: str,
        prefill: Sequence[str],
        decode: Sequence[str],
        encoder: Sequence[str] = (),
        *,
        reattach_s: float,
        tls: TlsFiles | None = None,
    ) -> None:
        terms = SessionTerms(
            router_id, itertools.count(1), reattach_s, tls, self._admit, self._on_change, lambda s: self.on_load(s)
        )
        self.prefill = {address: PrefillSession(address, terms) for address in prefill}
        self.decode = {address: DecodeSession(address, terms) for address in decode}
        self.encoders = {
            address: EncoderSession(address, tls, partial(self._admit_encoder, address), self._on_change)
            for address in encoder
        }
        self.on_load: Callable[[WorkerSession[Any]], None] = lambda session: None
        self._changed = asyncio.Event()
        self._watchers: dict[object, Callable[[], None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def sessions(self) -> tuple[PrefillSession | DecodeSession, ...]:
        """With the workers that hold KV."""
        return (*self.prefill.values(), *self.decode.values())

    @property
    def is_ready(self) -> bool:
        """At least one worker of each role that is listed serves."""
        listed = (self.prefill.values(), self.decode.values(), self.encoders.values())
        return all(any(session.is_serving for session in role) for role in listed if role)

    @property
    def num_open(self) -> int:
        """Requests open at workers."""
        return sum(session.num_open for session in (*self.sessions, *self.encoders.values()))

    def start(self) -> None:
        loop, every = asyncio.get_running_loop(), (*self.sessions, *self.encoders.values())
        self._tasks = [loop.create_task(session.run(), name=f"session {session.key}") for session in every]

    async def close(self) -> None:
        """Ends every session; requests that are still open are told that they are lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Asks again whenever the state of some worker has changed."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def wait_ready(self) -> None:
        await self.wait_until(lambda: self.is_ready)

    def watch(self, owner: object, on_change: Callable[[], None]) -> None:
        """Calls back whenever the state of some worker has changed, until `unwatch`."""
        self._watchers[owner] = on_change

    def unwatch(self, owner: object) -> None:
        self._watchers.pop(owner, None)

    def model(self) -> ServedModel | None:
        """As the workers that are there describe it, else as those did that were; None while none has been."""
        known = [s for s in self.sessions if s.description.model_fingerprint and s.state is not WorkerState.REFUSED]
        described = [session.description for session in ([s for s in known if s.is_up] or known)]
        if not described:
            return None
        return ServedModel(
            fingerprint=described[0].model_fingerprint,
            vocab_size=min(description.vocab_size for description in described),
            max_model_len=min(description.max_model_len for description in described),
        )

    async def wait_model(self, timeout_s: float) -> ServedModel:
        """Raises UnavailableError when no worker is there, nor was."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_until(lambda: self.model() is not None)
        except TimeoutError:
            raise UnavailableError(f"no worker serves yet, nor within {timeout_s:g} s; try again in a moment") from None
        model = self.model()
        assert model is not None
        return model

    async def wait_encoder_fingerprint(self, timeout_s: float) -> bytes:
        """Of the encoders that serve: all of them have the same. Raises UnavailableError when none comes in time."""

        def serving() -> EncoderSession | None:
            return next((session for session in self.encoders.values() if session.is_serving), None)

        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_until(lambda: serving() is not None)
        except TimeoutError:
            message = f"no encoder serves, nor did one come within {timeout_s:g} s; try again later"
            raise UnavailableError(message, role="encoder") from None
        session = serving()
        assert session is not None
        return session.description.model_fingerprint

    def _on_change(self) -> None:
        self._changed.set()
        for owner, on_change in list(self._watchers.items()):
            if owner in self._watchers:
                on_change()

    def _admit(self, session: WorkerSession[Any], description: worker_pb2.DescribeResponse) -> None:
        _require_role(session.key, session.role, description)
        for other in self.sessions:
            if other is not session and other.is_up:
                _require_same_model(session.key, description, other)
                return

    def _admit_encoder(self, key: str, description: worker_pb2.DescribeResponse) -> None:
        _require_role(key, "encoder", description)
        for other in self.encoders.values():
            known = other.description.model_fingerprint
            if other.key != key and other.is_serving and known != description.model_fingerprint:
                raise MismatchError(
                    f"encoder {key} has another tower or image processor than {other.key} (fingerprint "
                    f"{description.model_fingerprint.hex()[:16]} against {known.hex()[:16]}); start both with the same "
                    "checkpoint and dtype"
                )


def _require_role(key: str, role: str, description: worker_pb2.DescribeResponse) -> None:
    if description.role != _ROLES[role]:
        raise MismatchError(
            f"{key} is listed as a {role} worker but has the role "
            f"{worker_pb2.Role.Name(description.role)}; correct the router's list"
        )


def _require_same_model(key: str, description: worker_pb2.DescribeResponse, other: WorkerSession[Any]) -> None:
    known = other.description
    if description.model_fingerprint != known.model_fingerprint:
        raise MismatchError(
            f"worker {key} has another model than {other.worker_id} "
            f"(fingerprint {description.model_fingerprint.hex()[:16]} against {known.model_fingerprint.hex()[:16]}); "
            "start both with the same checkpoint and dtype"
        )
    if _kv_content(description) != _kv_content(known):
        raise MismatchError(
            f"worker {key} holds KV of another kind than {other.worker_id}; start both with the same checkpoint, "
            "--dtype and hash unit"
        )


def _kv_content(description: worker_pb2.DescribeResponse) -> list[tuple[str, int, int, int]]:
    """Of each KV group, what workers must agree on. Block sizes and ranks may differ: the reader slices."""
    return [(kv.dtype, kv.num_layers, kv.head_dim, kv.hash_unit_tokens) for kv in description.layouts]
