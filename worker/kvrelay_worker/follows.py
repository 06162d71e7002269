"""The source's Follow streams: between a reader's stream and the engine, which holds the pins (PROTOCOL B2, B3).

Every stream that attached tells the engine exactly once how it ended: released, or lost.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from enum import Enum
from typing import Any, Protocol

from kvrelay.v1 import kv_source_pb2 as pb
from kvrelay_core.errors import KvRelayError, SupersededError
from kvrelay_core.request import AttemptId, ErrorInfo
from kvrelay_core.rpc.status import error_to_detail
from kvrelay_core.rpc.wire import first_token_to_wire
from kvrelay_engine import messages
from kvrelay_transfer.ticket import KvTicket
from kvrelay_worker.engine_link import EngineLink
from kvrelay_worker.outbox import Outbox
from kvrelay_worker.wire import error_info_to_wire, group_blocks_to_wire, lease_to_wire

log = logging.getLogger(__name__)

# A reader that does not read its Follow is as good as lost; Ready is cumulative and rare.
FOLLOW_OUTBOX_LIMIT = 1024


class FollowEnd(Enum):
    """What the end of a Follow does to the lease of its ticket."""

    ENDED = "ended"  # the pins are free
    REFUSED = "refused"  # back with the router's stream, for another reader
    LOST = "lost"  # the transport broke: a reader may come back within the grace


class FollowObserver(Protocol):
    """Told of the readers of each attempt's ticket; not of those whose ticket was rejected."""

    def on_followed(self, attempt: AttemptId) -> None: ...

    def on_unfollowed(self, attempt: AttemptId, end: FollowEnd) -> None:
        """The last reader has left, or the ticket was released by a call."""


class FollowStream:
    def __init__(self, number: int, ticket: KvTicket, book: FollowBook) -> None:
        self.number = number
        self.ticket = ticket
        self.attached = False  # set once the engine has verified the ticket
        self.outbox: Outbox[pb.FollowResponse] = Outbox(FOLLOW_OUTBOX_LIMIT, on_overflow=self.lose)
        self._book = book

    def beat(self) -> None:
        self._book.tell(self, messages.FollowBeat(self.number))

    def release(self, reason: messages.ReleaseReason) -> None:
        """The reader left on purpose."""
        is_refused = reason is messages.ReleaseReason.REFUSED
        end = FollowEnd.REFUSED if is_refused else FollowEnd.ENDED
        self._book.leave(self, messages.FollowRelease(self.number, reason), end)
        self.outbox.close()

    def lose(self) -> None:
        """The transport ended. Without effect after a release or a failure."""
        if self.attached and self in self._book:
            log.warning(
                "the reader of ticket %s is lost, its KV stays pinned for %g s",
                self.ticket.ticket_id, self.ticket.lease.lost_grace_s,
            )  # fmt: skip
        self._book.leave(self, messages.FollowLost(self.number), FollowEnd.LOST)
        self.outbox.close()


class FollowBook:
    def __init__(self, engine: EngineLink, observer: FollowObserver | None = None) -> None:
        self._engine = engine
        self._observer = observer
        self._numbers = itertools.count(1)
        self._streams: dict[int, FollowStream] = {}
        self._followed: Counter[AttemptId] = Counter()
        engine.on(messages.FollowAttached, self._on_attached)
        engine.on(messages.FollowReady, self._on_ready)
        engine.on(messages.FollowComplete, self._on_complete)
        engine.on(messages.FollowFailed, self._on_failed)
        engine.on_loss(self.end_all)
        engine.on_silence(self._on_silence)

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, stream: FollowStream) -> bool:
        """Whether the reader and the engine still count on it."""
        return stream.number in self._streams

    def open(self, ticket: KvTicket) -> FollowStream:
        stream = FollowStream(next(self._numbers), ticket, self)
        self._engine.send(messages.FollowAttach(stream.number, ticket))
        self._streams[stream.number] = stream
        return stream

    def tell(self, stream: FollowStream, command: messages.EngineCommand) -> None:
        if stream in self:
            self._engine.notify(command)

    def leave(self, stream: FollowStream, command: messages.EngineCommand, end: FollowEnd) -> None:
        """Ends the stream on the reader's side; the first ending counts."""
        self.tell(stream, command)
        self._forget(stream.number, end)

    def end_all(self, error: KvRelayError) -> None:
        """This worker cannot serve its readers any more, and tells them why."""
        for number in list(self._streams):
            self._end(number, error_to_detail(error), FollowEnd.ENDED)

    def _on_silence(self, error: KvRelayError) -> None:
        """A hung engine seals nothing: readers are told, and it hears of their loss when it moves again (B3)."""
        for number, stream in list(self._streams.items()):
            if stream.attached:
                self._engine.notify(messages.FollowLost(number))
                self._end(number, error_to_detail(error), FollowEnd.LOST)

    # --------------------------------------------------------------------------------- the engine's events

    def _on_attached(self, event: messages.FollowAttached) -> None:
        stream = self._streams.get(event.follow)
        if stream is None:
            return
        stream.attached = True
        attempt = stream.ticket.attempt
        self._followed[attempt] += 1
        epoch = self._engine.started.engine_epoch
        self._put(event.follow, attached=pb.FollowAttached(engine_epoch=epoch, lease=lease_to_wire(event.lease)))
        if self._observer is not None:
            self._observer.on_followed(attempt)

    def _on_ready(self, event: messages.FollowReady) -> None:
        groups = [pb.GroupReady(group=group, num_blocks=count) for group, count in enumerate(event.num_blocks)]
        digests = [pb.BlockDigest(group=one.group, block=one.block, digest=one.digest) for one in event.digests]
        self._put(event.follow, ready=pb.FollowReady(groups=groups, digests=digests))

    def _on_complete(self, event: messages.FollowComplete) -> None:
        complete = pb.FollowComplete(
            first_tokens=map(first_token_to_wire, event.first_tokens),
            partial=map(group_blocks_to_wire, event.partial),
        )
        self._put(event.follow, complete=complete)

    def _on_failed(self, event: messages.FollowFailed) -> None:
        end = FollowEnd.LOST if _is_taken_over(event.error) else FollowEnd.ENDED
        self._end(event.follow, error_info_to_wire(event.error), end)

    def _put(self, number: int, **message: Any) -> None:
        stream = self._streams.get(number)
        if stream is not None:
            stream.outbox.put(pb.FollowResponse(**message))

    def _end(self, number: int, detail: Any, end: FollowEnd) -> None:
        """The engine ended it: the reader is told why, the engine need not be told."""
        self._put(number, failed=detail)
        stream = self._forget(number, end)
        if stream is not None:
            stream.outbox.close()

    def _forget(self, number: int, end: FollowEnd) -> FollowStream | None:
        stream = self._streams.pop(number, None)
        if stream is None or not stream.attached:
            return stream
        attempt = stream.ticket.attempt
        self._followed[attempt] -= 1
        if not self._followed[attempt]:
            del self._followed[attempt]
            if self._observer is not None:
                self._observer.on_unfollowed(attempt, end)
        return stream


def _is_taken_over(error: ErrorInfo) -> bool:
    """The lease goes on with another Follow, which the engine reports next."""
    return error.reason == SupersededError.__name__
