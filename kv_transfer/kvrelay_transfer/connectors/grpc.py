"""The engine's half of the byte-stream connector: what is left to do around a socket that the service owns.

A read is asked for through `SocketHalf`; the service fetches the bytes from the peer's service into staging
slots and delivers them here piece by piece, with the words that the source read after it had copied. Slots are
copied into the pool on the engine's thread, so an aborted read is terminal at once: nobody writes later. Of a peer with
another layout whole blocks are fetched, each once, and the slices are cut out of the slot. Knows no gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay_core.clock import Clock
from kvrelay_core.errors import DeadlineError, KvRelayError, TransferError
from kvrelay_transfer.connectors.base import (
    BlockRead,
    BlockSlices,
    Connector,
    ConnectorOffer,
    EndedTransfer,
    PeerInfo,
    PeerLink,
    Transfer,
    TransferState,
    check_block_range,
    check_slices,
)
from kvrelay_transfer.embedding_layout import PoolLayout

DEFAULT_DEADLINE_S = 30.0


class SocketHalf(Protocol):
    """The service process, as this connector sees it."""

    def fetch(self, read_id: int, peer_id: str, read: BlockRead) -> None:
        """Brings `read.remote_blocks`, whole."""
        ...

    def abort_fetch(self, read_id: int) -> None: ...

    def free_slot(self, slot: int) -> None: ...


class SlotReader(Protocol):
    @property
    def layout(self) -> PoolLayout: ...

    @property
    def slot_bytes(self) -> int: ...

    def copy_in(self, slot: int, blocks: tuple[int, ...]) -> None: ...

    def copy_in_slices(
        self, slot: int, sent_block_bytes: int, positions: Sequence[int], blocks: Sequence[int], slices: BlockSlices
    ) -> None: ...


@dataclass(slots=True, frozen=True, eq=False)
class _Fetching:
    transfer: _FetchTransfer
    read: BlockRead
    num_blocks: int  # that are fetched
    positions: Sequence[int]  # of the block of each pair among them
    words: dict[int, int]  # position -> word
    link: _GrpcLink


class GrpcConnector(Connector):
    name = "grpc"
    can_slice = True

    def __init__(
        self,
        num_blocks: int,
        staging: SlotReader,
        socket_half: SocketHalf,
        clock: Clock,
        deadline_s: float = DEFAULT_DEADLINE_S,
        first_read_id: int = 1,
    ) -> None:
        """`num_blocks` of our own pool. Reads are numbered from `first_read_id` on, so that two pools of one engine can
        share a socket half."""
        self._num_blocks = num_blocks
        self._staging = staging
        self._socket_half = socket_half
        self._clock = clock
        self._deadline_s = deadline_s
        self._fetching: dict[int, _Fetching] = {}
        self._next_read_id = first_read_id

    def offer(self) -> ConnectorOffer:
        return ConnectorOffer(self.name, b"")

    def connect(self, peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
        slot_bytes, block_bytes = self._staging.slot_bytes, peer.layout.block_bytes
        if block_bytes > slot_bytes:
            raise TransferError(
                f"a block of {peer.peer_id} has {block_bytes} bytes, a staging slot here {slot_bytes}; "
                f"lower its --block-tokens (now {peer.layout.block_tokens})"
            )
        return _GrpcLink(self, peer)

    def close(self) -> None:
        for read_id in list(self._fetching):
            self._give_up(read_id, TransferState.TORN_DOWN, TransferError("the connector was closed"))

    # ------------------------------------------------------------------------------ from the socket half

    def deliver(self, read_id: int, first: int, slot: int, words: tuple[int, ...]) -> None:
        """Blocks [first, first + len(words)) of those to fetch lie in `slot`. Pieces of a read that is over only give
        their slot back."""
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
        num_blocks = fetching.num_blocks
        if error is None and len(fetching.words) == num_blocks:
            words = tuple(fetching.words[position] for position in fetching.positions)
            fetching.transfer.finish(TransferState.DONE, words=words)
            return
        short = TransferError(f"the peer sent {len(fetching.words)} of {num_blocks} blocks")
        fetching.transfer.finish(TransferState.FAILED, error=error or short)

    def _copy_in(self, fetching: _Fetching, first: int, slot: int, words: tuple[int, ...]) -> None:
        read, end = fetching.read, first + len(words)
        if first < 0 or end > fetching.num_blocks:
            raise TransferError("the peer sent blocks that were not asked for")
        if read.slices is None:
            self._staging.copy_in(slot, read.local_blocks[first:end])
        else:
            self._cut_out(fetching, first, end, slot, read.slices)
        fetching.words.update(enumerate(words, start=first))

    def _cut_out(self, fetching: _Fetching, first: int, end: int, slot: int, slices: BlockSlices) -> None:
        """Copies the pairs of the blocks at [first, end), which lie in `slot`."""
        pairs = [pair for pair, position in enumerate(fetching.positions) if first <= position < end]
        part = BlockSlices(slices.shape, slices.remote_offsets[pairs], slices.local_offsets[pairs])
        positions = [fetching.positions[pair] - first for pair in pairs]
        blocks = [fetching.read.local_blocks[pair] for pair in pairs]
        self._staging.copy_in_slices(slot, fetching.link.block_bytes, positions, blocks, part)

    # ---------------------------------------------------------------------------------- from the transfers

    def start(self, link: _GrpcLink, read: BlockRead) -> Transfer:
        try:
            check_block_range(read.local, self._num_blocks, "our")
            check_slices(read, link.block_bytes, self._staging.layout.block_bytes)
        except TransferError as error:
            return EndedTransfer(error)
        read_id = self._next_read_id
        self._next_read_id += 1
        transfer = _FetchTransfer(self, read_id, self._clock.now() + self._deadline_s)
        wanted, positions = _each_once(read)
        self._fetching[read_id] = _Fetching(transfer, read, len(wanted), positions, {}, link)
        self._socket_half.fetch(
            read_id, link.peer_id, BlockRead(read.ticket, read.group, wanted, read.local, read.slices)
        )
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


def _each_once(read: BlockRead) -> tuple[tuple[int, ...], Sequence[int]]:
    """The blocks to fetch, and the position of each pair's block among them. Whole blocks are in one pair each."""
    if read.slices is None:
        return read.remote_blocks, range(len(read.remote_blocks))
    position_of = {block: position for position, block in enumerate(dict.fromkeys(read.remote_blocks))}
    return tuple(position_of), [position_of[block] for block in read.remote_blocks]


class _GrpcLink(PeerLink):
    def __init__(self, connector: GrpcConnector, peer: PeerInfo) -> None:
        self._connector = connector
        self.peer_id = peer.peer_id
        self.block_bytes = peer.layout.block_bytes
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
