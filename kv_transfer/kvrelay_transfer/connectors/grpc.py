"""The engine's half of the byte-stream connector: what is left to do around a socket that the service owns.

A read is asked for through `SocketHalf`; the service fetches the bytes from the peer's service into staging
slots and delivers them here piece by piece, with the words that the source read after it had copied. Slots are
copied into the pool on the engine's thread, so an aborted read is terminal at once: nobody writes later. Knows
no gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvrelay_core.clock import Clock
from kvrelay_core.errors import DeadlineError, KvRelayError, TransferError
from kvrelay_transfer.connectors.base import (
    BlockRead,
    Connector,
    ConnectorOffer,
    EndedTransfer,
    PeerInfo,
    PeerLink,
    Transfer,
    TransferState,
    check_block_range,
)

DEFAULT_DEADLINE_S = 30.0


class SocketHalf(Protocol):
    """The service process, as this connector sees it."""

    def fetch(self, read_id: int, peer_id: str, read: BlockRead) -> None: ...

    def abort_fetch(self, read_id: int) -> None: ...

    def free_slot(self, slot: int) -> None: ...


class SlotReader(Protocol):
    def copy_in(self, slot: int, blocks: tuple[int, ...]) -> None: ...


@dataclass(slots=True, frozen=True, eq=False)
class _Fetching:
    transfer: _FetchTransfer
    read: BlockRead
    words: dict[int, int]  # position in the read -> word
    link: _GrpcLink


class GrpcConnector(Connector):
    name = "grpc"

    def __init__(
        self,
        num_blocks: int,
        staging: SlotReader,
        socket_half: SocketHalf,
        clock: Clock,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        """`num_blocks` of our own pool."""
        self._num_blocks = num_blocks
        self._staging = staging
        self._socket_half = socket_half
        self._clock = clock
        self._deadline_s = deadline_s
        self._fetching: dict[int, _Fetching] = {}
        self._next_read_id = 1

    def offer(self) -> ConnectorOffer:
        return ConnectorOffer(self.name, b"")

    def connect(self, peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
        return _GrpcLink(self, peer.peer_id)

    def close(self) -> None:
        for read_id in list(self._fetching):
            self._give_up(read_id, TransferState.TORN_DOWN, TransferError("the connector was closed"))

    # ------------------------------------------------------------------------------ from the socket half

    def deliver(self, read_id: int, first: int, slot: int, words: tuple[int, ...]) -> None:
        """Blocks [first, first + len(words)) of the read lie in `slot`. Pieces of a read that is over only
        give their slot back."""
        fetching = self._fetching.get(read_id)
        try:
            if fetching is not None:
                self._copy_in(fetching, first, slot, words)
        except TransferError as error:
            self._give_up(read_id, TransferState.FAILED, error)
        finally:
            self._socket_half.free_slot(slot)

    def end(self, read_id: int, error: KvRelayError | None) -> None:
        """The socket half is through with the read."""
        fetching = self._fetching.pop(read_id, None)
        if fetching is None:
            return
        num_blocks = len(fetching.read.local_blocks)
        if error is None and len(fetching.words) == num_blocks:
            words = tuple(fetching.words[position] for position in range(num_blocks))
            fetching.transfer.finish(TransferState.DONE, words=words)
            return
        short = TransferError(f"the peer sent {len(fetching.words)} of {num_blocks} blocks")
        fetching.transfer.finish(TransferState.FAILED, error=error or short)

    def _copy_in(self, fetching: _Fetching, first: int, slot: int, words: tuple[int, ...]) -> None:
        local = fetching.read.local_blocks[first : first + len(words)]
        if first < 0 or len(local) != len(words):
            raise TransferError("the peer sent blocks that were not asked for")
        self._staging.copy_in(slot, local)
        fetching.words.update(enumerate(words, start=first))

    # ---------------------------------------------------------------------------------- from the transfers

    def start(self, link: _GrpcLink, read: BlockRead) -> Transfer:
        try:
            check_block_range(read.local_blocks, self._num_blocks, "our")
        except TransferError as error:
            return EndedTransfer(error)
        read_id = self._next_read_id
        self._next_read_id += 1
        transfer = _FetchTransfer(self, read_id, self._clock.now() + self._deadline_s)
        self._fetching[read_id] = _Fetching(transfer, read, {}, link)
        self._socket_half.fetch(read_id, link.peer_id, read)
        return transfer

    def check_deadline(self, read_id: int, deadline_at_s: float) -> None:
        if self._clock.now() >= deadline_at_s:
            error = DeadlineError(f"the peer did not send the blocks within {self._deadline_s:g} s")
            self._give_up(read_id, TransferState.FAILED, error)

    def abort(self, read_id: int) -> None:
        self._give_up(read_id, TransferState.FAILED, TransferError("the read was given up"))

    def tear_down(self, link: _GrpcLink) -> None:
        error = TransferError(f"the connection to {link.peer_id} was closed")
        for read_id in [read_id for read_id, fetching in self._fetching.items() if fetching.link is link]:
            self._give_up(read_id, TransferState.TORN_DOWN, error)

    def _give_up(self, read_id: int, state: TransferState, error: KvRelayError) -> None:
        fetching = self._fetching.pop(read_id, None)
        if fetching is not None:
            fetching.transfer.finish(state, error=error)
            self._socket_half.abort_fetch(read_id)


class _GrpcLink(PeerLink):
    def __init__(self, connector: GrpcConnector, peer_id: str) -> None:
        self._connector = connector
        self.peer_id = peer_id
        self._is_closed = False

    def read(self, read: BlockRead) -> Transfer:
        if self._is_closed:
            return EndedTransfer(TransferError(f"the link to {self.peer_id} is closed"), TransferState.TORN_DOWN)
        return self._connector.start(self, read)

    def close(self) -> None:
        self._is_closed = True
        self._connector.tear_down(self)


class _FetchTransfer(Transfer):
    def __init__(self, connector: GrpcConnector, read_id: int, deadline_at_s: float) -> None:
        self._connector = connector
        self._read_id = read_id
        self._deadline_at_s = deadline_at_s
        self._state = TransferState.PENDING

    def poll(self) -> TransferState:
        if self._state is TransferState.PENDING:
            self._connector.check_deadline(self._read_id, self._deadline_at_s)
        return self._state

    def abort(self) -> None:
        self._connector.abort(self._read_id)

    def finish(self, state: TransferState, *, words: tuple[int, ...] = (), error: KvRelayError | None = None) -> None:
        self.words = words
        self.error = error
        self._state = state
