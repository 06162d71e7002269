"""A UCX worker and the one thread that drives it: messages out and in, and endpoints that may fail.

The thread sleeps in poll() on UCX's descriptor and on one of our own, by which other threads hand it jobs; all of
UCX, and every callback, runs on it. With a pool on a GPU it only naps for a moment after each event, since waking up
takes as long as a chunk there; it naps rather than spins, for the interpreter is the step loop's. A message is received
only once it has arrived: no receive is ever posted that nothing may come for, so that giving up a read leaves nothing
behind that could write. Knows tags and buffers, no blocks and no tickets.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.ucx_library import UcxLibrary
from kvrelay_transfer.connectors.ucx_messages import CHUNK, HELLO, make_tag, split_tag
from kvrelay_transfer.naps import allow_naps, nap

logger = logging.getLogger(__name__)

Job = Callable[[], None]
Done = Callable[[TransferError | None], None]
MessageTaker = Callable[[int, bytes], None]  # link id, message

TICK_S = 0.5  # how often `on_tick` is called while requests are under way
_GOODBYE_S = 0.2  # for last messages, when the worker is closed
_MAX_MESSAGE_BYTES = 64 << 20  # a ticket of a million blocks


def _ignore(error: TransferError | None) -> None:
    pass


@dataclass(slots=True, eq=False)
class Arrival:
    """A message that has come, or whose sender waits for us to take it."""

    number: int  # the id in its tag
    index: int
    size_bytes: int
    probe: Any


@dataclass(slots=True, eq=False)
class _Send:
    tag: int
    buffer: Any
    on_done: Done


@dataclass(slots=True, eq=False)
class UcxPeer:
    endpoint: Any
    on_lost: Job
    is_open: bool = True
    held: list[_Send] | None = field(default_factory=list)  # until it is wired up; then None


@dataclass(slots=True, eq=False)
class _Request:
    """Of UCX. It keeps its buffer, and its endpoint, for as long as UCX may touch them."""

    request: Any
    buffer: object
    on_done: Done


@dataclass(slots=True, eq=False)
class _Receipt:
    """A control message that is still being received; those of one link are taken in the order of their sending."""

    buffer: np.ndarray[Any, np.dtype[np.uint8]]
    is_over: bool = False
    error: TransferError | None = None


@dataclass(slots=True)
class _Handlers:
    on_chunk: Callable[[Arrival], None]
    on_message: Mapping[int, MessageTaker]
    on_tick: Job
    on_start: Job
    mailboxes: dict[int, deque[_Receipt]] = field(default_factory=dict)  # by tag


class UcxWorker:
    def __init__(self, library: UcxLibrary, worker: Any, name: str, awake_s: float = 0.0) -> None:
        """The thread only naps for `awake_s` after an event. Starts with `start`."""
        self._library = library
        self._worker = worker
        self.address: bytes = worker.address.tobytes()
        self._awake_s = awake_s
        self._is_asleep = False
        self._jobs: deque[Job] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._requests: list[_Request] = []
        self._copies: deque[tuple[Callable[[], bool], Job]] = deque()
        self._lost: deque[UcxPeer] = deque()
        self._any_tag = library.api.UCXXTag(0)
        self._no_mask = library.api.UCXXTagMask(0)
        self._peers: set[UcxPeer] = set()
        self._is_releasing = False  # an endpoint was closed, and requests may be left of it
        self._closing_at_s: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(
        self,
        on_chunk: Callable[[Arrival], None],
        on_message: Mapping[int, MessageTaker],
        on_tick: Job,
        on_start: Job = lambda: None,
    ) -> None:
        """`on_message` has a taker for each kind of control message. None of the handlers may raise; `on_start` is
        called first, on the thread."""
        self._handlers = _Handlers(on_chunk, on_message, on_tick, on_start)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """False: nothing is sent, received or copied any more."""
        return self._thread.is_alive()

    # ------------------------------------------------------------------------------------ from any thread

    def post(self, job: Job) -> None:
        """`job` runs on the thread, after those posted before, and must not raise."""
        self._jobs.append(job)
        if self._is_asleep:  # it says so before it looks at the jobs for the last time
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Returns when the thread has done what was posted before and is over."""
        if self._worker is not None:
            self.post(self._stop)
            self._thread.join()
            self._worker = None
            os.close(self._wake_fd)

    # -------------------------------------------------------------------------------------- on the thread

    def connect(self, address: bytes, on_lost: Job) -> UcxPeer:
        """Raises TransferError. `on_lost` is called once if the peer dies or closes, not after `disconnect`."""
        api = self._library.api
        try:
            peer_address = api.UCXAddress.create_from_buffer(address)
            endpoint = self._worker.create_endpoint_from_worker_address(peer_address, True)
        except (api.UCXError, ValueError, IndexError) as error:  # the last for an empty address
            raise TransferError(f"UCX cannot reach the peer: {error}") from error
        peer = UcxPeer(endpoint, on_lost)
        self._peers.add(peer)
        endpoint.set_close_callback(self._note_lost, (peer,))
        # UCX crashes when an endpoint is closed while larger messages wait for it to be wired up (1.21).
        self._send_now(
            peer, _Send(make_tag(HELLO, 0), self.wrap(np.zeros(1, np.uint8)), lambda _: self._send_held(peer))
        )
        return peer

    def disconnect(self, peer: UcxPeer) -> None:
        """Requests on it end soon, as failed. A peer that is lost needs it too."""
        if peer.is_open:
            peer.is_open = False
            self._peers.discard(peer)
            peer.endpoint.remove_close_callback()
            # Forced, for the endpoint handles errors: waits for nothing that the peer would have to do.
            peer.endpoint.close_blocking()
            peer.endpoint = None  # it holds its callback, which holds the peer
            self._send_held(peer)
            self._is_releasing = True
            self._release_cancelled()

    def _release_cancelled(self) -> None:
        """Requests of closed endpoints: until they are let go, they hold the worker, which holds them."""
        self._worker.cancel_inflight_requests()

    def wrap(self, buffer: Any) -> Any:
        """Bytes of numpy or torch as `send` and `receive` take them."""
        return self._library.array(buffer)

    def send(self, peer: UcxPeer, tag: int, buffer: Any, on_done: Done) -> None:
        """`buffer` (see `wrap`) is UCX's until `on_done` is called, which is never within this call."""
        send = _Send(tag, buffer, on_done)
        if peer.held is not None:
            peer.held.append(send)
        else:
            self._send_now(peer, send)

    def _send_held(self, peer: UcxPeer) -> None:
        held, peer.held = peer.held or [], None
        for send in held:
            self._send_now(peer, send)

    def _send_now(self, peer: UcxPeer, send: _Send) -> None:
        api = self._library.api
        if not peer.is_open:
            self.post(lambda: send.on_done(TransferError("the connection is closed")))
            return
        try:
            request = peer.endpoint.tag_send(send.buffer, api.UCXXTag(send.tag))
        except api.UCXError as error:
            failure = TransferError(f"UCX cannot send: {error}")
            self.post(lambda: send.on_done(failure))
            return
        self._requests.append(_Request(request, (send.buffer, peer.endpoint), send.on_done))

    def send_message(self, peer: UcxPeer, kind: int, link_id: int, message: bytes, on_done: Done = _ignore) -> None:
        """A message that cannot be sent is lost with its peer, which `on_lost` tells."""
        buffer = self.wrap(np.frombuffer(message, np.uint8))
        self.send(peer, make_tag(kind, link_id), buffer, on_done)

    def receive(self, arrival: Arrival, buffer: Any, on_done: Done) -> None:
        """`buffer` (see `wrap`) has the size of the arrival and is UCX's until `on_done` is called."""
        request = self._worker.tag_recv_with_handle(buffer, arrival.probe)
        self._requests.append(_Request(request, buffer, on_done))

    def watch_copy(self, is_over: Callable[[], bool], then: Job) -> None:
        """Calls `then` once the device's copy is over. Copies are watched in the order of one stream."""
        self._copies.append((is_over, then))

    # ------------------------------------------------------------------------------------------- the loop

    def _run(self) -> None:
        self._handlers.on_start()
        if self._awake_s:
            allow_naps()
        poll = select.poll()
        poll.register(self._worker.epoll_file_descriptor, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        ticked_s = awake_until_s = time.monotonic()
        while not self._is_over():
            did_something = self._work()
            now_s = time.monotonic()
            if did_something:
                awake_until_s = now_s + self._awake_s
            elif now_s < awake_until_s or self._copies:  # UCX is not told when a copy of the device ends
                nap()
            else:
                self._sleep(poll)
            if self._requests and now_s - ticked_s >= TICK_S:
                ticked_s = now_s
                self._handlers.on_tick()
        self._let_go()

    def _is_over(self) -> bool:
        if self._closing_at_s is None:
            return False
        return not self._requests or time.monotonic() - self._closing_at_s >= _GOODBYE_S

    def _let_go(self) -> None:
        """Closes every endpoint, and ends what is still under way: afterwards UCX touches no buffer of ours."""
        for peer in list(self._peers):
            self.disconnect(peer)
        stop_s = time.monotonic() + _GOODBYE_S
        while self._requests and time.monotonic() < stop_s:
            self._worker.progress()
            self._requests = [request for request in self._requests if not request.request.completed]
        self._worker.progress()
        self._release_cancelled()
        while self._worker.tag_probe(self._any_tag, self._no_mask, True).matched:
            pass  # UCX would wait for ever for what dead peers have announced
        if self._requests:
            logger.warning("UCX did not end %d requests; their memory is kept", len(self._requests))

    def _work(self) -> bool:
        """One round of everything; False when there was nothing to do."""
        did_jobs = self._run_jobs()
        has_moved = self._worker.progress_once()
        if has_moved:
            self._worker.progress()  # until nothing moves
        took = self._take_arrivals()
        ended = self._end_requests()
        copied = self._end_copies()
        return did_jobs or has_moved or took or ended or copied

    def _sleep(self, poll: select.poll) -> None:
        self._is_asleep = True
        if not self._jobs and self._worker.arm():
            is_closing = self._closing_at_s is not None
            for fd, _ in poll.poll(_GOODBYE_S * 1e2 if is_closing else TICK_S * 1e3 if self._requests else None):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
        self._is_asleep = False

    def _run_jobs(self) -> bool:
        num_jobs = len(self._jobs)
        for _ in range(num_jobs):
            self._jobs.popleft()()
        return num_jobs > 0

    def _stop(self) -> None:
        self._closing_at_s = time.monotonic()

    def _take_arrivals(self) -> bool:
        took = False
        while (probe := self._worker.tag_probe(self._any_tag, self._no_mask, True)).matched:
            took = True
            kind, number, index = split_tag(probe.sender_tag.value)
            arrival = Arrival(number, index, probe.length, probe)
            if kind == CHUNK:
                self._handlers.on_chunk(arrival)
            else:
                self._receive_message(kind, arrival)
        return took

    def _receive_message(self, kind: int, arrival: Arrival) -> None:
        if kind == HELLO and arrival.size_bytes == 1:
            self.receive(arrival, self.wrap(np.empty(1, np.uint8)), _ignore)
            return
        if kind not in self._handlers.on_message or arrival.size_bytes > _MAX_MESSAGE_BYTES:
            logger.warning("dropped a UCX message of %d bytes that is not ours", arrival.size_bytes)
            return
        receipt = _Receipt(np.empty(arrival.size_bytes, np.uint8))
        mailbox = self._handlers.mailboxes.setdefault(make_tag(kind, arrival.number), deque())
        mailbox.append(receipt)

        def end(error: TransferError | None) -> None:
            receipt.is_over, receipt.error = True, error
            self._empty_mailbox(kind, arrival.number)

        self.receive(arrival, self.wrap(receipt.buffer), end)

    def _empty_mailbox(self, kind: int, link_id: int) -> None:
        tag = make_tag(kind, link_id)
        mailbox = self._handlers.mailboxes[tag]
        while mailbox and mailbox[0].is_over:
            receipt = mailbox.popleft()
            if receipt.error is None:
                self._handlers.on_message[kind](link_id, receipt.buffer.tobytes())
        if not mailbox:
            del self._handlers.mailboxes[tag]

    def _end_requests(self) -> bool:
        over = [request for request in self._requests if request.request.completed]
        if over:
            self._requests = [request for request in self._requests if request not in over]
            if self._is_releasing:
                self._release_cancelled()
                self._is_releasing = bool(self._requests)
            for request in over:
                request.on_done(self._error_of(request.request))
        while self._lost:
            peer = self._lost.popleft()
            if peer.is_open:
                peer.on_lost()
        return bool(over)

    def _end_copies(self) -> bool:
        """In the order in which they were begun, which is that of their stream."""
        num_before = len(self._copies)
        while self._copies and self._copies[0][0]():
            _, then = self._copies.popleft()
            then()
        return len(self._copies) < num_before

    def _error_of(self, request: Any) -> TransferError | None:
        try:
            request.check_error()
        except self._library.api.UCXError as error:
            return TransferError(f"UCX: {error}")
        return None

    def _note_lost(self, peer: UcxPeer) -> None:
        """From within UCX's progress, where endpoints must not be touched."""
        self._lost.append(peer)
