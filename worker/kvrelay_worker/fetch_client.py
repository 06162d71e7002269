"""The reader's half of the grpc connector: brings blocks of a peer over the socket into staging slots.

On the engine's Fetch it calls KvSourceService.Fetch at the peer, piece by piece, two pieces in flight; the engine
copies each piece out of its slot, compares the words and answers SlotFree. Blocks travel whole, in the peer's size.
Knows nothing of leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay_core.error_info import info_of
from kvrelay_core.errors import InternalError, KvRelayError, RequestCancelledError, TransferError, WorkerLostError
from kvrelay_engine.messages import Fetch, FetchAbort, FetchedPiece, FetchEnded, SlotFree
from kvrelay_transfer.ticket import KvTicket
from kvrelay_worker.embedding_wire import fetch_to_wire
from kvrelay_worker.peer_errors import RETRY_PAUSE_S, peer_errors
from kvrelay_worker.peers import PeerBook
from kvrelay_worker.staging import Staging
from kvrelay_worker.worker import Worker

log = logging.getLogger(__name__)

PIECES_IN_FLIGHT = 2


@dataclass(slots=True)
class _Read:
    task: asyncio.Task[None]
    error: KvRelayError | None = field(default_factory=lambda: RequestCancelledError("the read was aborted"))


class FetchClient:
    def __init__(self, worker: Worker, peers: PeerBook) -> None:
        self._worker = worker
        self._peers = peers
        self._reads: dict[int, _Read] = {}
        worker.engine.on(Fetch, self._on_fetch)
        worker.engine.on(FetchAbort, self._on_abort)
        worker.engine.on_loss(self._on_loss)
        worker.engine.on(SlotFree, lambda event: self._staging.imports.release(event.slot))

    @property
    def _staging(self) -> Staging:
        return self._worker.slots

    def _on_fetch(self, fetch: Fetch) -> None:
        read = _Read(self._worker.request_tasks.spawn(self._run(fetch), f"fetch {fetch.read}"))
        self._reads[fetch.read] = read
        read.task.add_done_callback(lambda _: self._end(fetch.read))

    def _on_abort(self, abort: FetchAbort) -> None:
        read = self._reads.get(abort.read)
        if read is not None:
            read.task.cancel()

    def _on_loss(self, error: KvRelayError) -> None:
        for read in self._reads.values():
            read.task.cancel()

    def _end(self, number: int) -> None:
        """The task is over, if it ever ran: every piece's slot is the engine's or free again by now."""
        read = self._reads.pop(number)
        self._worker.engine.notify(FetchEnded(number, None if read.error is None else info_of(read.error)))

    async def _run(self, fetch: Fetch) -> None:
        read = self._reads[fetch.read]
        try:
            await self._fetch_all(fetch)
            read.error = None
        except KvRelayError as error:
            read.error = error
        except Exception as error:
            log.exception("read %d from %s broke", fetch.read, fetch.peer_id)
            read.error = InternalError(f"unexpected {type(error).__name__} during a read; see the worker's log")

    async def _fetch_all(self, fetch: Fetch) -> None:
        permits = asyncio.Semaphore(PIECES_IN_FLIGHT)
        step = self._staging.slot_bytes // _block_bytes(fetch)
        if step == 0:
            raise TransferError(f"a block of {fetch.peer_id} is larger than a staging slot")

        async def run_piece(first: int) -> None:
            async with permits:
                await self._fetch_piece(fetch, first, fetch.blocks[first : first + step])

        try:
            async with asyncio.TaskGroup() as group:
                for first in range(0, len(fetch.blocks), step):
                    group.create_task(run_piece(first))
        except ExceptionGroup as failed:
            raise _first_leaf(failed.exceptions) from failed

    async def _fetch_piece(self, fetch: Fetch, first: int, blocks: Sequence[int]) -> None:
        timeout_s = self._worker.config.fetch_timeout_s
        slot: int | None = None
        try:
            async with asyncio.timeout(timeout_s):
                slot = await self._staging.imports.acquire()
                words = await self._receive_patiently(fetch, blocks, slot)
                self._worker.engine.send(FetchedPiece(fetch.read, first, slot, words))
                slot = None  # the engine's, until SlotFree
        except TimeoutError as error:
            raise TransferError(f"{fetch.peer_id} sent no complete piece within {timeout_s:g} s") from error
        finally:
            if slot is not None:
                self._staging.imports.release(slot)

    async def _receive_patiently(self, fetch: Fetch, blocks: Sequence[int], slot: int) -> tuple[int, ...]:
        """A lost transport may come back within the grace; the piece begins anew then."""
        give_up_at_s: float | None = None
        while True:
            try:
                with peer_errors(fetch.peer_id):
                    return await self._receive(fetch, blocks, slot)
            except WorkerLostError:
                now_s = asyncio.get_running_loop().time()
                give_up_at_s = give_up_at_s or now_s + self._worker.config.follow_grace_s
                if now_s >= give_up_at_s:
                    raise
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _receive(self, fetch: Fetch, blocks: Sequence[int], slot: int) -> tuple[int, ...]:
        """Fills the slot; returns the words. TransferError when the peer sends more or less than asked for."""
        stub = self._peers.stub(fetch.peer_id)
        expected_bytes = len(blocks) * _block_bytes(fetch)
        received_bytes = 0
        request = fetch_to_wire(fetch.ticket, fetch.group, tuple(blocks))
        call = stub.Fetch(request, wait_for_ready=True)
        self._worker.streams.enter()
        try:
            async for response in call:
                if received_bytes + len(response.data) > expected_bytes:
                    raise TransferError(f"{fetch.peer_id} sent more than the {expected_bytes} bytes asked for")
                self._staging.write(slot, received_bytes, response.data)
                received_bytes += len(response.data)
                if response.last:
                    if received_bytes != expected_bytes or len(response.words) != len(blocks):
                        raise TransferError(f"{fetch.peer_id} sent {received_bytes} of {expected_bytes} bytes")
                    return tuple(response.words)
        finally:
            call.cancel()
            self._worker.streams.leave()
        raise WorkerLostError(f"{fetch.peer_id} ended the read early")


def _block_bytes(fetch: Fetch) -> int:
    """Of the group that is read, at its source."""
    ticket = fetch.ticket
    return ticket.layouts[fetch.group].block_bytes if isinstance(ticket, KvTicket) else ticket.layout.block_bytes


def _first_leaf(errors: Sequence[BaseException]) -> BaseException:
    """The first cause within nested exception groups."""
    first = errors[0]
    return _first_leaf(first.exceptions) if isinstance(first, BaseExceptionGroup) else first
