"""The test twin of a connector: pools of one process, reads that land when the test says so.

A `MemoryFabric` is the network. A posted read waits there until the test lands it, in one go or data first and
words later; fails it; or never touches it again, which leaves the deadline, abort and close. As with a network
card, an abort does not stop a copy: the transfer stays pending until the fabric or the deadline ends it.
"""

from __future__ import annotations

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
    check_slices,
)
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.slice_copy import copy_slices

DEFAULT_DEADLINE_S = 10.0


class MemoryFabric:
    """Connects the pools of one process, and holds the reads that have not landed."""

    def __init__(self) -> None:
        self._pools: dict[bytes, PoolMemory] = {}
        self.pending: list[MemoryTransfer] = []

    def expose(self, endpoint: bytes, memory: PoolMemory) -> None:
        self._pools[endpoint] = memory

    def hide(self, endpoint: bytes) -> None:
        self._pools.pop(endpoint, None)

    def find(self, endpoint: bytes) -> PoolMemory | None:
        return self._pools.get(endpoint)

    def land_all(self) -> None:
        """Every pending read's data and words arrive now."""
        for transfer in list(self.pending):
            transfer.land()


class MemoryConnector(Connector):
    name = "memory"
    can_slice = True

    def __init__(
        self,
        fabric: MemoryFabric,
        memory: PoolMemory,
        clock: Clock,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        self._fabric = fabric
        self._memory = memory
        self._clock = clock
        self._deadline_s = deadline_s
        # An engine may have two pools.
        window = getattr(memory.layout, "window", 0)
        self._endpoint = memory.engine_epoch + (window.to_bytes(4) if window else b"")
        fabric.expose(self._endpoint, memory)

    def offer(self) -> ConnectorOffer:
        return ConnectorOffer(self.name, self._endpoint)

    def connect(self, peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
        source = self._fabric.find(offer.endpoint)
        if source is None or source.engine_epoch != peer.engine_epoch:
            raise TransferError(f"{peer.peer_id} is not in this process, or has restarted")
        if source.layout != peer.layout:
            raise TransferError(f"the pool of {peer.peer_id} has another layout than the peer says")
        return _MemoryLink(self._fabric, source, self._memory, self._clock, self._deadline_s)

    def close(self) -> None:
        self._fabric.hide(self._endpoint)


class _MemoryLink(PeerLink):
    def __init__(
        self, fabric: MemoryFabric, source: PoolMemory, destination: PoolMemory, clock: Clock, deadline_s: float
    ) -> None:
        self._fabric = fabric
        self._source = source
        self._destination = destination
        self._clock = clock
        self._deadline_s = deadline_s
        self._is_closed = False

    def read(self, read: BlockRead) -> Transfer:
        if self._is_closed:
            return EndedTransfer(TransferError("the link is closed"), TransferState.TORN_DOWN)
        try:
            check_block_range(read.remote, self._source.num_blocks, "the peer's")
            check_block_range(read.local, self._destination.num_blocks, "our")
            check_slices(read, self._source.layout.block_bytes, self._destination.layout.block_bytes)
        except TransferError as error:
            return EndedTransfer(error)
        deadline_at_s = self._clock.now() + self._deadline_s
        transfer = MemoryTransfer(self, read, self._source, self._destination, self._clock, deadline_at_s)
        self._fabric.pending.append(transfer)
        return transfer

    def close(self) -> None:
        self._is_closed = True
        for transfer in [transfer for transfer in self._fabric.pending if transfer.link is self]:
            transfer.end(TransferState.TORN_DOWN, TransferError("the link was closed"))

    def forget(self, transfer: MemoryTransfer) -> None:
        self._fabric.pending.remove(transfer)


class MemoryTransfer(Transfer):
    """A read in the fabric. `land`, or `copy_data` then `read_words`, or `end` decide its fate."""

    def __init__(
        self,
        link: _MemoryLink,
        read: BlockRead,
        source: PoolMemory,
        destination: PoolMemory,
        clock: Clock,
        deadline_at_s: float,
    ) -> None:
        self.request = read
        self.was_aborted = False
        self.link = link
        self._source = source
        self._destination = destination
        self._clock = clock
        self._deadline_at_s = deadline_at_s
        self._state = TransferState.PENDING

    def poll(self) -> TransferState:
        if self._state is TransferState.PENDING and self._clock.now() >= self._deadline_at_s:
            self.end(TransferState.FAILED, DeadlineError("the read did not land before its deadline"))
        return self._state

    def abort(self) -> None:
        self.was_aborted = True

    # ------------------------------------------------------------------------------- what the test decides

    def land(self) -> None:
        self.copy_data()
        self.read_words()

    def copy_data(self) -> None:
        assert not self._state.is_terminal, "a transfer that has ended writes nothing any more"
        read = self.request
        if read.slices is not None:
            source, destination = self._source.host_blocks, self._destination.host_blocks
            copy_slices(source, read.remote_blocks, destination, read.local_blocks, read.slices)
            return
        for remote, local in zip(read.remote_blocks, read.local_blocks, strict=True):
            self._destination.block_rows[local].copy_(self._source.block_rows[remote])

    def read_words(self) -> None:
        self.words = tuple(self._source.words.read(block) for block in self.request.remote_blocks)
        self._finish(TransferState.DONE)

    def end(self, state: TransferState, error: KvRelayError) -> None:
        """Ends without data; nothing happens when it has ended before."""
        if not self._state.is_terminal:
            self.error = error
            self._finish(state)

    def _finish(self, state: TransferState) -> None:
        self.link.forget(self)
        self._state = state
