"""Same host, CPU pools: maps the peer's segment read-only and copies blocks out of it.

`connect` gets the segment's descriptor from the peer's DescriptorServer and maps it; reads are memmove runs, or strided
copies where the layouts differ, on one copy thread per connector, followed by a second operation that reads the
words. A new link's bandwidth is measured on that thread too, between the reads. The mapping outlives the peer, so a
peer that dies under a read does no harm; whether its data is still good is what the words say.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from kvrelay_core.clock import Clock
from kvrelay_core.errors import DeadlineError, KvRelayError, MismatchError, TransferError
from kvrelay_transfer.connectors.bandwidth_probe import BandwidthProbe
from kvrelay_transfer.connectors.base import (
    BlockRead,
    Connector,
    ConnectorOffer,
    EndedTransfer,
    LinkSpeed,
    PeerInfo,
    PeerLink,
    Transfer,
    TransferState,
    check_block_range,
    check_slices,
)
from kvrelay_transfer.connectors.copy_thread import CopyThread, copy_span, merge_runs
from kvrelay_transfer.descriptor_server import DescriptorServer, fetch_descriptor
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.region import RemoteRegion
from kvrelay_transfer.slice_copy import copy_slices

DEFAULT_DEADLINE_S = 10.0
PROBE_BYTES = 64 << 20


class ShmEndpoint(Struct, frozen=True, array_like=True):
    host_id: str
    socket_path: str


def host_id() -> str:
    """The same for all processes under one running kernel, and for no others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class ShmConnector(Connector):
    name = "shm"
    can_slice = True

    def __init__(
        self, memory: PoolMemory, clock: Clock, socket_path: Path | None, deadline_s: float = DEFAULT_DEADLINE_S
    ) -> None:
        """Serves the pool's descriptor at `socket_path`; None: this side only reads."""
        assert memory.device == "cpu", "shm connects CPU pools"
        self._memory = memory
        self._clock = clock
        self._deadline_s = deadline_s
        self._server = None if socket_path is None else DescriptorServer(socket_path, memory.fd)
        self._thread = CopyThread("shm-copy")
        self._links: list[_ShmLink] = []

    def offer(self) -> ConnectorOffer | None:
        if self._server is None:
            return None
        endpoint = ShmEndpoint(host_id(), str(self._server.path.absolute()))
        return ConnectorOffer(self.name, msgspec.msgpack.encode(endpoint))

    def connect(self, peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
        region = self._map(peer, offer)
        link = _ShmLink(peer.peer_id, self._memory, region, self._thread, self._clock, self._deadline_s)
        self._links = [known for known in self._links if not known.is_closed] + [link]
        return link

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._thread.close()
        if self._server is not None:
            self._server.close()

    def _map(self, peer: PeerInfo, offer: ConnectorOffer) -> RemoteRegion:
        try:
            endpoint = msgspec.msgpack.decode(offer.endpoint, type=ShmEndpoint)
        except msgspec.MsgspecError as error:
            raise TransferError(f"{peer.peer_id} offers a shm endpoint that this version cannot read") from error
        if endpoint.host_id != host_id():
            raise TransferError(f"{peer.peer_id} is on another host; shm reaches pools of this one only")
        fd = fetch_descriptor(endpoint.socket_path)
        try:
            region = RemoteRegion.attach(fd, peer.layout, peer.engine_epoch)
        except (MismatchError, OSError, ValueError) as error:
            raise TransferError(f"the segment of {peer.peer_id} cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        if region.data_bytes == 0:
            region.close()
            raise TransferError(f"the pool of {peer.peer_id} is not in host memory")
        return region


class _ShmLink(PeerLink):
    def __init__(
        self,
        peer_id: str,
        memory: PoolMemory,
        region: RemoteRegion,
        thread: CopyThread,
        clock: Clock,
        deadline_s: float,
    ) -> None:
        self.peer_id = peer_id
        self.memory = memory
        self.region = region
        self.is_closed = False
        self._thread = thread
        self._clock = clock
        self._deadline_s = deadline_s
        self._speed: LinkSpeed | None = None
        size_bytes = min(PROBE_BYTES, region.data_bytes)
        BandwidthProbe(thread.post, region.block_address(0), size_bytes, self._is_open, self._take_speed).start()

    def read(self, read: BlockRead) -> Transfer:
        if self.is_closed:
            return EndedTransfer(TransferError(f"the link to {self.peer_id} is closed"), TransferState.TORN_DOWN)
        try:
            check_block_range(read.remote, self.region.header.num_blocks, "the peer's")
            check_block_range(read.local, self.memory.num_blocks, "our")
            check_slices(read, self.region.header.block_bytes, self.memory.layout.block_bytes)
        except TransferError as error:
            return EndedTransfer(error)
        transfer = _ShmTransfer(self, read, self._clock, self._clock.now() + self._deadline_s)
        self._thread.post(transfer.run)
        return transfer

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            # Behind the last read in the queue: no copy is under way when the mapping goes. A slice of the probe may
            # come later; it sees that the link is closed, which was noted before.
            self._thread.post(self.region.close)

    def probed_gb_per_s(self) -> float | None:
        return None if self._speed is None else self._speed.gb_per_s

    def probed_speed(self) -> LinkSpeed | None:
        return self._speed

    def _take_speed(self, speed: LinkSpeed) -> None:
        self._speed = speed

    def _is_open(self) -> bool:
        return not self.is_closed


class _ShmTransfer(Transfer):
    """Posted by the step loop, run by the copy thread; only the thread makes it terminal, after its last store."""

    def __init__(self, link: _ShmLink, read: BlockRead, clock: Clock, deadline_at_s: float) -> None:
        self._link = link
        self._read = read
        self._clock = clock
        self._deadline_at_s = deadline_at_s
        self._state = TransferState.PENDING
        self._was_aborted = False

    def poll(self) -> TransferState:
        return self._state

    def abort(self) -> None:
        self._was_aborted = True

    def run(self) -> None:
        """On the copy thread. The state is stored last: who sees it sees the rest."""
        if self._copy(self._is_wanted):
            self.words = self._link.region.words.read(self._read.remote_blocks)
            self._state = TransferState.DONE
            return
        self.error = self._why_unwanted()
        self._state = TransferState.TORN_DOWN if self._link.is_closed else TransferState.FAILED

    def _copy(self, is_wanted: Callable[[], bool]) -> bool:
        region, memory, read = self._link.region, self._link.memory, self._read
        if read.slices is not None:
            sent, ours = region.host_blocks, memory.host_blocks
            return copy_slices(sent, read.remote_blocks, ours, read.local_blocks, read.slices, is_wanted)
        block_bytes = memory.layout.block_bytes
        for remote, local, count in merge_runs(read.remote_blocks, read.local_blocks):
            destination = memory.data_address + local * block_bytes
            if not copy_span(destination, region.block_address(remote), count * block_bytes, is_wanted):
                return False
        return True

    def _is_wanted(self) -> bool:
        return not (self._was_aborted or self._link.is_closed or self._clock.now() >= self._deadline_at_s)

    def _why_unwanted(self) -> KvRelayError:
        if self._link.is_closed:
            return TransferError(f"the connection to {self._link.peer_id} was closed")
        if self._was_aborted:
            return TransferError("the read was given up")
        return DeadlineError("the blocks could not be copied before the read's deadline")
