"""The source's half of the grpc connector: has the engine copy blocks into staging slots, to be streamed from there.

A slot is in the engine's hands from Export until Exported, also when nobody waits for the answer any more.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from kvrelay_core.error_info import error_of
from kvrelay_core.errors import KvRelayError, OverloadedError, TransferError
from kvrelay_engine.messages import Export, Exported
from kvrelay_transfer.ticket import Ticket
from kvrelay_worker.staging import SlotAllocator
from kvrelay_worker.worker import Worker


@dataclass(frozen=True, slots=True)
class ExportedPiece:
    """Whole blocks in a slot, and their words as read after the copy. The receiver releases the slot."""

    slot: int
    words: tuple[int, ...]


@dataclass(slots=True)
class _Pending:
    slots: SlotAllocator
    slot: int
    answer: asyncio.Future[Exported]
    limit: asyncio.Timeout


class Exports:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._engine = worker.engine
        self._timeout_s = worker.config.fetch_timeout_s
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._engine.on(Exported, self._on_exported)
        self._engine.on_loss(self._on_loss)

    async def export(self, ticket: Ticket, group: int, blocks: tuple[int, ...]) -> ExportedPiece:
        """As many blocks as a slot holds. Raises what the engine answers (ticket rejected, lease over),
        OverloadedError when no slot comes free, TransferError when the engine does not answer."""
        slots = self._worker.slots.exports
        slot = await self._acquire(slots)
        number = next(self._numbers)
        pending = _Pending(slots, slot, asyncio.get_running_loop().create_future(), asyncio.timeout(self._timeout_s))
        try:
            self._engine.send(Export(number, ticket, group, blocks, slot))
        except KvRelayError:
            slots.release(slot)
            raise
        self._pending[number] = pending
        exported = await self._await_answer(pending)
        if exported.error is None and len(exported.words) == len(blocks):
            return ExportedPiece(slot, exported.words)
        slots.release(slot)
        if exported.error is not None:
            raise error_of(exported.error)
        raise TransferError(f"the engine exported {len(exported.words)} of {len(blocks)} blocks")

    def give_up_waiting(self) -> None:
        """Ends the waits for the engine. A slot goes back when the engine has answered after all."""
        now_s = asyncio.get_running_loop().time()
        for pending in self._pending.values():
            if not pending.answer.done() and not pending.limit.expired():
                pending.limit.reschedule(now_s)

    async def _acquire(self, slots: SlotAllocator) -> int:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await slots.acquire()
        except TimeoutError as error:
            raise OverloadedError(f"no staging slot came free within {self._timeout_s:g} s") from error

    async def _await_answer(self, pending: _Pending) -> Exported:
        try:
            async with pending.limit:
                return await asyncio.shield(pending.answer)
        except TimeoutError as error:
            self._abandon(pending)
            raise TransferError("the engine did not export in time") from error
        except asyncio.CancelledError:
            self._abandon(pending)
            raise

    def _abandon(self, pending: _Pending) -> None:
        """Nobody waits any more: the slot goes back now if the engine has answered, else when it does."""
        if pending.answer.done():
            pending.slots.release(pending.slot)
        else:
            pending.answer.cancel()

    def _on_exported(self, exported: Exported) -> None:
        pending = self._pending.pop(exported.export, None)
        if pending is None:
            return
        if pending.answer.cancelled():
            pending.slots.release(pending.slot)
        else:
            pending.answer.set_result(exported)

    def _on_loss(self, error: KvRelayError) -> None:
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(error)
        self._pending.clear()
