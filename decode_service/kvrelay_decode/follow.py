"""The reader's side of one hand-off's Follow stream (PROTOCOL B2, B3).

It tells the engine what the source sealed and how the hand-off ended there, and tells the source that the engine
is alive, only ever when the engine itself has just said so. A lost source may come back within the grace; then the
stream is opened again and everything it says is cumulative. Knows nothing of blocks.
"""

from __future__ import annotations

import asyncio
import logging

from kvrelay.v1 import common_pb2
from kvrelay.v1 import kv_source_pb2 as pb
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import HandoffError, InternalError, KvRelayError, WorkerLostError
from kvrelay_core.rpc.status import error_from_detail
from kvrelay_core.rpc.wire import first_token_from_wire
from kvrelay_engine.messages import HandoffComplete, HandoffFailed, HandoffReady, ReleaseReason
from kvrelay_transfer.block_digest import BlockDigest
from kvrelay_transfer.ticket import KvTicket
from kvrelay_worker.outbox import Outbox
from kvrelay_worker.peer_errors import RETRY_PAUSE_S, peer_errors
from kvrelay_worker.peers import PeerBook
from kvrelay_worker.wire import group_blocks_from_wire, release_reason_to_wire, ticket_to_wire
from kvrelay_worker.worker import Worker

log = logging.getLogger(__name__)

OUTBOX_LIMIT = 64  # beats that the source may be behind
RELEASE_LINGER_S = 2.0  # for the source to take note of a release


class HandoffFollow:
    def __init__(self, worker: Worker, peers: PeerBook, request_id: int, ticket: KvTicket) -> None:
        self._worker = worker
        self._peers = peers
        self._request_id = request_id
        self._ticket = ticket
        self._outbox: Outbox[pb.FollowRequest] | None = None  # of the stream that is open now
        self._limit: asyncio.Timeout | None = None
        self._is_attached = False
        self._is_released = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = self._worker.request_tasks.spawn(self._run(), f"follow of request {self._request_id}")

    def beat(self, pulled_blocks: int) -> None:
        """The engine is alive. Called for its beats and for nothing else."""
        if self._outbox is not None:
            self._outbox.put(pb.FollowRequest(alive=pb.FollowAlive(pulled_blocks=pulled_blocks)))

    def release(self, reason: ReleaseReason) -> None:
        """Gives the pins back and ends the stream. The first call counts."""
        if self._is_released:
            return
        self._is_released = True
        if self._outbox is None or self._limit is None:
            assert self._task is not None, "released before it was started"
            self._task.cancel()
            return
        self._outbox.put(pb.FollowRequest(release=pb.FollowRelease(reason=release_reason_to_wire(reason))))
        self._outbox.close()
        if not self._limit.expired():  # else the Follow is ending as it is
            self._limit.reschedule(asyncio.get_running_loop().time() + RELEASE_LINGER_S)

    # ------------------------------------------------------------------------------------------- internal

    async def _run(self) -> None:
        try:
            await self._follow_until_released()
        except _SourceFailedError as failed:
            self._fail(failed.error)
        except KvRelayError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the follow of request %d broke", self._request_id)
            self._fail(InternalError(f"unexpected {type(error).__name__} while following; see decode's log"))

    def _fail(self, error: KvRelayError) -> None:
        """Whatever ended the Follow, the engine hears of it: nobody else ends its wait."""
        if not self._is_released:
            self._worker.engine.notify(HandoffFailed(self._request_id, info_of(error)))

    async def _follow_until_released(self) -> None:
        """Raises what ended the Follow, WorkerLostError once the source has been away for too long."""
        deadline_s = asyncio.get_running_loop().time() + self._worker.config.call_timeout_s
        while not self._is_released:
            self._is_attached = False
            try:
                async with asyncio.timeout_at(deadline_s) as self._limit:
                    await self._follow_once(self._limit)
            except TimeoutError as error:
                raise WorkerLostError(f"{self._ticket.source_address} did not take the Follow in time") from error
            except WorkerLostError as error:
                deadline_s = self._lost(error, deadline_s)
                # A call may still be put on the connection that is just dying: it failing proves nothing.
                await asyncio.sleep(RETRY_PAUSE_S)

    def _lost(self, error: WorkerLostError, deadline_s: float) -> float:
        """Until when the source may come back: within the grace, also where it had not answered yet."""
        grace_s = self._worker.config.follow_grace_s
        grace_ends_s = asyncio.get_running_loop().time() + grace_s
        if not self._is_attached and grace_ends_s >= deadline_s:
            return deadline_s
        if not self._is_released:
            log.warning(
                "the follow of request %d is lost, it may come back within %g s: %s",
                self._request_id, grace_s, error.message,
            )  # fmt: skip
        return grace_ends_s

    async def _follow_once(self, limit: asyncio.Timeout) -> None:
        stub = await self._peers.connect(self._ticket)
        reader = common_pb2.WorkerRef(worker_id=self._worker.config.worker_id, address=self._worker.address)
        outbox: Outbox[pb.FollowRequest] = Outbox(OUTBOX_LIMIT)
        outbox.put(pb.FollowRequest(open=pb.FollowOpen(ticket=ticket_to_wire(self._ticket), reader=reader)))
        with peer_errors(self._ticket.source_address):
            call = stub.Follow(outbox, wait_for_ready=True)
            self._outbox = outbox
            self._worker.streams.enter()
            try:
                async for response in call:
                    self._hear(response, limit)
            finally:
                self._outbox = None
                outbox.close()
                call.cancel()
                self._worker.streams.leave()
        if not self._is_released:
            raise HandoffError(f"{self._ticket.source_address} ended the Follow without a reason")

    def _hear(self, response: pb.FollowResponse, limit: asyncio.Timeout) -> None:
        if self._is_released:
            return
        match response.WhichOneof("message"):
            case "attached":
                self._is_attached = True
                if not limit.expired():
                    limit.reschedule(None)
            case "ready":
                self._worker.engine.send(_ready(self._request_id, response.ready))
            case "complete":
                self._worker.engine.send(_complete(self._request_id, response.complete))
            case "failed":
                raise _SourceFailedError(error_from_detail(response.failed))


class _SourceFailedError(Exception):
    """The source itself ended the hand-off: final, also where it says that its engine is lost."""

    def __init__(self, error: KvRelayError) -> None:
        super().__init__(error.message)
        self.error = error


def _ready(request_id: int, wire: pb.FollowReady) -> HandoffReady:
    groups = sorted(wire.groups, key=lambda ready: ready.group)
    digests = tuple(BlockDigest(one.group, one.block, one.digest) for one in wire.digests)
    return HandoffReady(request_id, tuple(ready.num_blocks for ready in groups), digests)


def _complete(request_id: int, wire: pb.FollowComplete) -> HandoffComplete:
    first_tokens = tuple(map(first_token_from_wire, wire.first_tokens))
    return HandoffComplete(request_id, first_tokens, tuple(map(group_blocks_from_wire, wire.partial)))
