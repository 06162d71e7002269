"""Any peer that UCX reaches, host and GPU pools: packed chunks, sent by a source that takes part.

Two-sided: the reader asks, the source validates the ticket, packs the blocks into chunks, sends these, and says at
the end what the words were; the reader unpacks. One thread per connector does both sides (see `ucx_worker`), asleep
while there is nothing to do. Needs the extra `ucx`. See docs/adr/0013.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from kvrelay_core.clock import Clock
from kvrelay_core.errors import TransferError
from kvrelay_transfer.connectors.base import Connector, ConnectorOffer, ExportGate, PeerInfo, PeerLink
from kvrelay_transfer.connectors.ucx_chunks import make_copier
from kvrelay_transfer.connectors.ucx_library import UcxLibrary
from kvrelay_transfer.connectors.ucx_link import UcxLink
from kvrelay_transfer.connectors.ucx_messages import TO_READER, TO_SOURCE, UcxEndpoint
from kvrelay_transfer.connectors.ucx_reader import UcxReader
from kvrelay_transfer.connectors.ucx_source import UcxSource
from kvrelay_transfer.connectors.ucx_worker import UcxWorker
from kvrelay_transfer.pool_memory import PoolMemory

DEFAULT_DEADLINE_S = 30.0
# Between GPUs a chunk takes a tenth of a millisecond, and the next read may come soon.
AWAKE_S = {"cpu": 0.0, "cuda": 0.002}


class UcxConnector(Connector):
    name = "ucx"

    def __init__(
        self,
        memory: PoolMemory,
        clock: Clock,
        deadline_s: float = DEFAULT_DEADLINE_S,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """`options` as in UCX_*, without the prefix. Raises ConfigError when ucxx is missing or cannot start."""
        self._memory = memory
        self._clock = clock
        self._deadline_s = deadline_s
        library = UcxLibrary.load()
        ucx_worker = library.make_worker(memory.device, options)
        self.worker = UcxWorker(library, ucx_worker, "ucx", AWAKE_S[memory.device])
        copier = make_copier(memory, self.worker)
        self.source = UcxSource(memory, self.worker, copier, clock)
        self.reader = UcxReader(self.worker, copier, clock)
        takers = {TO_SOURCE: self.source.take_message, TO_READER: self.reader.take_message}
        self.worker.start(self.reader.take_chunk, takers, self._check_progress, copier.enter)
        self._chunk_bytes = copier.chunk_bytes
        self._links: list[UcxLink] = []

    def offer(self) -> ConnectorOffer:
        endpoint = UcxEndpoint(self.worker.address, self._memory.engine_epoch, _host_id(), self._chunk_bytes)
        return ConnectorOffer(self.name, msgspec.msgpack.encode(endpoint))

    def serve(self, gate: ExportGate | None) -> None:
        self.source.serve(gate)

    def connect(self, peer: PeerInfo, offer: ConnectorOffer) -> PeerLink:
        endpoint = self._read_offer(peer, offer)
        link = UcxLink(peer.peer_id, endpoint, self.reader, self._memory.num_blocks, self._clock, self._deadline_s)
        link.connect()
        self._links = [known for known in self._links if not known.is_closed] + [link]
        return link

    def close(self) -> None:
        for link in self._links:
            link.close()
        self.worker.close()

    def _read_offer(self, peer: PeerInfo, offer: ConnectorOffer) -> UcxEndpoint:
        try:
            endpoint = msgspec.msgpack.decode(offer.endpoint, type=UcxEndpoint)
        except msgspec.MsgspecError as error:
            raise TransferError(f"{peer.peer_id} offers a ucx endpoint that this version cannot read") from error
        if endpoint.engine_epoch != peer.engine_epoch:
            raise TransferError(f"the ucx endpoint of {peer.peer_id} is of another engine start; connect again")
        if peer.layout != self._memory.layout:
            raise TransferError(f"the pool of {peer.peer_id} has another layout, which ucx cannot read")
        if endpoint.chunk_bytes < self._memory.layout.block_bytes:
            raise TransferError(f"{peer.peer_id} offers ucx chunks that hold no block")
        return endpoint

    def _check_progress(self) -> None:
        self.source.check_progress()
        self.reader.check_progress()


def _host_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
