"""Same host, GPU pools: maps the peer's pool on our GPU and copies blocks over NVLink or PCIe.

`connect` opens the peer's IPC handle on *our* device (opened on the owner's, as torch's own sharing does, our kernels
refuse the pointer) and maps its fence words read-only. Reads are posted on a stream of their own beside the engine's
steps; an event says that the data is here, then the words are read from host memory. The mapping keeps the peer's
memory alive, so a peer that dies under a read does no harm; it goes as soon as the peer has gone.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from kvrelay_core.clock import Clock
from kvrelay_core.errors import DeadlineError, KvRelayError, MismatchError, TransferError
from kvrelay_transfer.connectors.base import (
    BlockRead,
    Blocks,
    Connector,
    ConnectorOffer,
    EndedTransfer,
    PeerInfo,
    PeerLink,
    ReadWindow,
    Transfer,
    TransferState,
    check_block_range,
    check_slices,
)
from kvrelay_transfer.connectors.device_copy import DeviceCopier, MappedPool
from kvrelay_transfer.connectors.device_probe import DeviceProbe
from kvrelay_transfer.connectors.mapping_keeper import MappingKeeper
from kvrelay_transfer.connectors.offset_tables import has_fired
from kvrelay_transfer.connectors.shm import host_id
from kvrelay_transfer.cuda_runtime import CudaCallError, CudaRuntime
from kvrelay_transfer.descriptor_server import DescriptorServer, fetch_descriptors
from kvrelay_transfer.fence import WordArray
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.region import RemoteRegion

log = logging.getLogger(__name__)

DEFAULT_DEADLINE_S = 10.0
# An engine that decodes looks once a step, and what it has not posted by then waits for the next look: so much that
# NVLink is busy for a step of 5 ms. A posted copy cannot be taken back; this much is over in 5 ms too. Each read costs
# the engine's thread a tenth of a millisecond or two, hence few and large ones.
WINDOW = ReadWindow(max_reads=8, max_read_bytes=256 << 20)
# A look costs a microsecond, and reads take tenths of a millisecond.
POLL_S = 0.00005


class CudaIpcEndpoint(Struct, frozen=True, array_like=True):
    host_id: str
    socket_path: str  # gives the segment with the words, and a pipe that closes when the owner ends
    ipc_handle: bytes
    bus_id: str  # of the GPU
    num_blocks: int


class CudaIpcConnector(Connector):
    name = "cuda_ipc"
    can_slice = True

    def __init__(
        self, memory: PoolMemory, clock: Clock, socket_path: Path | None, deadline_s: float = DEFAULT_DEADLINE_S
    ) -> None:
        """Serves what peers need at `socket_path`; None: this side only reads. Raises ConfigError without CUDA."""
        assert memory.device == "cuda", "cuda_ipc connects pools in GPU memory"
        self.memory = memory
        self.clock = clock
        self.deadline_s = deadline_s
        self.runtime = CudaRuntime.load()
        self.copier = DeviceCopier(self.runtime, memory)
        self.keeper = MappingKeeper("cuda-ipc-keeper")
        self._links: list[_CudaIpcLink] = []
        self._life = os.pipe2(os.O_CLOEXEC)
        self._server = None if socket_path is None else DescriptorServer(socket_path, memory.fd, self._life[0])

    @property
    def device_index(self) -> int:
        index = self.copier.device.index
        assert index is not None, "a tensor knows its device"
        return int(index)

    def offer(self) -> ConnectorOffer | None:
        if self._server is None:
            return None
        endpoint = CudaIpcEndpoint(
            host_id=host_id(),
            socket_path=str(self._server.path.absolute()),
            ipc_handle=self.runtime.export(self.memory.data_address),
            bus_id=self.runtime.bus_id(self.device_index),
            num_blocks=self.memory.num_blocks,
        )
        return ConnectorOffer(self.name, msgspec.msgpack.encode(endpoint))

    def connect(self, peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
        endpoint = self._check_reachable(peer, offer)
        region, life_fd = self._map_words(peer, endpoint)
        try:
            address = self.runtime.open(endpoint.ipc_handle, self.device_index)
        except CudaCallError as error:
            region.close()
            os.close(life_fd)
            raise TransferError(f"the GPU memory of {peer.peer_id} cannot be mapped: {error}") from error
        link = _CudaIpcLink(self, peer.peer_id, region, MappedPool(address, peer.layout.block_bytes), life_fd)
        self._links = [known for known in self._links if not known.is_closed] + [link]
        return link

    def close(self) -> None:
        for link in self._links:
            link.close()
        self.keeper.close()
        if self._server is not None:
            self._server.close()
        for fd in self._life:
            os.close(fd)

    def _check_reachable(self, peer: PeerInfo, offer: ConnectorOffer) -> CudaIpcEndpoint:
        try:
            endpoint = msgspec.msgpack.decode(offer.endpoint, type=CudaIpcEndpoint)
        except msgspec.MsgspecError as error:
            raise TransferError(f"{peer.peer_id} offers a cuda_ipc endpoint that this version cannot read") from error
        if endpoint.host_id != host_id():
            raise TransferError(f"{peer.peer_id} is on another host; cuda_ipc reaches GPUs of this one only")
        if peer.engine_epoch == self.memory.engine_epoch:
            raise TransferError("a process cannot map its own pool by cuda_ipc")
        if not self._can_access(endpoint.bus_id):
            raise TransferError(f"GPU {self.device_index} cannot access the GPU of {peer.peer_id}, {endpoint.bus_id}")
        return endpoint

    def _can_access(self, bus_id: str) -> bool:
        # A GPU that CUDA_VISIBLE_DEVICES hides is no obstacle; then opening the handle is the check.
        device = self.runtime.find_device(bus_id)
        return device in (None, self.device_index) or torch.cuda.can_device_access_peer(self.device_index, device)

    def _map_words(self, peer: PeerInfo, endpoint: CudaIpcEndpoint) -> tuple[RemoteRegion, int]:
        fd, life_fd = fetch_descriptors(endpoint.socket_path, 2)
        try:
            region = RemoteRegion.attach(fd, peer.layout, peer.engine_epoch)
        except (MismatchError, TransferError, OSError, ValueError) as error:
            os.close(life_fd)
            raise TransferError(f"the segment of {peer.peer_id} cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        if region.data_bytes or region.header.num_blocks != endpoint.num_blocks:
            region.close()
            os.close(life_fd)
            raise TransferError(f"the segment of {peer.peer_id} does not belong to the GPU pool that it offers")
        return region, life_fd


class _CudaIpcLink(PeerLink):
    """Used by the engine's thread, and by the keeper's as a `Mapping`. `_lock` lies between "closed" and posting: once
    it is closed no copy is posted, and the mapping goes only when all that were posted have ended."""

    window = WINDOW

    def __init__(
        self, connector: CudaIpcConnector, peer_id: str, region: RemoteRegion, pool: MappedPool, life_fd: int
    ) -> None:
        self.peer_id = peer_id
        self.life_fd = life_fd
        self.is_closed = False
        self._connector = connector
        self._region = region
        self._pool = pool
        self._lock = threading.Lock()
        self._posted: list[torch.cuda.Event] = []
        size_bytes = region.header.num_blocks * pool.block_bytes
        self._probe = DeviceProbe(connector.copier, pool.address, size_bytes)
        self._posted.append(self._probe.end)
        connector.keeper.watch(self)

    def read(self, read: BlockRead) -> Transfer:
        try:
            check_block_range(read.remote, self._region.header.num_blocks, "the peer's")
            check_block_range(read.local, self._connector.memory.num_blocks, "our")
            check_slices(read, self._pool.block_bytes, self._connector.memory.layout.block_bytes)
            event = self._post(read)
        except KvRelayError as error:
            state = TransferState.TORN_DOWN if self.is_closed else TransferState.FAILED
            return EndedTransfer(error, state)
        clock = self._connector.clock
        return _CudaIpcTransfer(self, read.remote, event, clock, clock.now() + self._connector.deadline_s)

    def close(self) -> None:
        self.lose()
        self._connector.keeper.retire(self)

    def probed_gb_per_s(self) -> float | None:
        return 0.0 if self.is_closed else self._probe.gb_per_s()

    def read_words(self, blocks: Blocks) -> WordArray | None:
        """None when the link was closed meanwhile."""
        with self._lock:
            return None if self.is_closed else self._region.words.read_at(blocks)

    def _post(self, read: BlockRead) -> torch.cuda.Event:
        """No waiting for the engine's stream: our destination blocks left the free list after the last step that could
        touch them had completed (PROTOCOL A4), and the step that first uses what arrived is launched after `poll` said
        DONE, thus after the copy's event fired."""
        copier = self._connector.copier
        with self._lock:
            if self.is_closed:
                raise TransferError(f"the link to {self.peer_id} is closed")
            try:
                if read.slices is not None:
                    event = copier.copy_slices(self._pool, read.remote, read.local, read.slices)
                else:
                    event = copier.copy_blocks(self._pool, read.remote, read.local)
            except (CudaCallError, RuntimeError) as error:
                raise TransferError(f"the read from {self.peer_id} could not be posted: {error}") from error
            self._posted = [posted for posted in self._posted if not has_fired(posted)] + [event]
        return event

    # ---------------------------------------------------------------------------- as the keeper's Mapping

    def lose(self) -> None:
        with self._lock:
            self.is_closed = True

    def unmap(self) -> bool:
        self._posted = [event for event in self._posted if not has_fired(event)]
        if self._posted:
            return False
        self._region.close()
        try:
            self._connector.runtime.close(self._pool.address, self._connector.device_index)
        except CudaCallError as error:
            log.warning("the memory of %s could not be unmapped: %s", self.peer_id, error)
        return True


class _CudaIpcTransfer(Transfer):
    """A copy cannot be taken back: whatever is asked for, the destination is under write until the event fires."""

    poll_s = POLL_S

    def __init__(
        self, link: _CudaIpcLink, blocks: Blocks, event: torch.cuda.Event, clock: Clock, deadline_at_s: float
    ) -> None:
        """`blocks` are the peer's."""
        self._link = link
        self._blocks = blocks
        self._event = event
        self._clock = clock
        self._deadline_at_s = deadline_at_s
        self._state = TransferState.PENDING
        self._was_aborted = False

    def poll(self) -> TransferState:
        if self._state.is_terminal:
            return self._state
        self.error = self.error or self._why_unwanted()
        try:
            if has_fired(self._event):
                self._finish()
        except RuntimeError as error:  # of the CUDA context itself, which runs nothing any more
            self.error = TransferError(f"the GPU failed under the read from {self._link.peer_id}: {error}")
            self._state = TransferState.FAILED
        return self._state

    def abort(self) -> None:
        self._was_aborted = True

    def _finish(self) -> None:
        words = self._link.read_words(self._blocks)
        if words is None:
            self.error = TransferError(f"the connection to {self._link.peer_id} was closed")
            self._state = TransferState.TORN_DOWN
        elif self.error is not None:
            self._state = TransferState.FAILED
        else:
            self.words = words
            self._state = TransferState.DONE

    def _why_unwanted(self) -> KvRelayError | None:
        if self._was_aborted:
            return TransferError("the read was given up")
        if self._clock.now() >= self._deadline_at_s:
            return DeadlineError("the blocks did not arrive before the read's deadline")
        return None
