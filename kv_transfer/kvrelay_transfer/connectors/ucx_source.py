"""The source's side of the ucx connector: validates what a reader asks for, packs it and sends it.

Everything but `serve` runs on the connector's thread. Chunks are packed in turn for all reads; a chunk is free again
when its reader has taken it or is gone. The words of a read are read after its last chunk was packed (PROTOCOL A6).
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import KvRelayError, LeaseExpiredError, TransferError
from kvrelay_transfer.connectors.base import Blocks, ExportGate, check_block_range
from kvrelay_transfer.connectors.ucx_chunks import Chunk, ChunkCopier, ChunkPool
from kvrelay_transfer.connectors.ucx_messages import (
    CHUNK,
    MAX_CHUNKS,
    PROBE_CHUNKS,
    TO_READER,
    Goodbye,
    ProbeRequest,
    ReadAbort,
    ReadDone,
    ReaderMessage,
    ReadFailed,
    ReadRequest,
    make_tag,
    source_decoder,
    ticket_decoder,
)
from kvrelay_transfer.connectors.ucx_worker import UcxPeer, UcxWorker
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.ticket import Ticket

logger = logging.getLogger(__name__)

MAX_CHUNKS_SENDING = 8
MAX_CHUNKS_PER_READER = 4  # packed, announced, and two that are taken; a stopped reader holds no more
SEND_DEADLINE_S = 30.0


@dataclass(slots=True, eq=False)
class _Reader:
    link_id: int
    peer: UcxPeer
    servings: dict[int, _Serving] = field(default_factory=dict)  # by read id
    num_sending: int = 0


@dataclass(slots=True, eq=False)
class _Serving:
    reader: _Reader
    read_id: int
    blocks: Blocks
    prepared: Any  # the same for the copier
    chunk_blocks: int
    num_packed: int = 0  # blocks
    next_index: int = 0  # of a chunk
    is_wanted: bool = True

    @property
    def is_packed(self) -> bool:
        return self.num_packed == len(self.blocks)


@dataclass(slots=True, eq=False)
class _Sending:
    serving: _Serving
    chunk: Chunk
    since_s: float


class UcxSource:
    def __init__(self, memory: PoolMemory, worker: UcxWorker, copier: ChunkCopier, clock: Clock) -> None:
        self._memory = memory
        self._worker = worker
        self._copier = copier
        self._clock = clock
        self._gate: ExportGate | None = None
        self._ticket: Ticket | None = None  # the last one, and how it was encoded
        self._encoded_ticket = b""
        self._chunks = ChunkPool(copier.allocate, MAX_CHUNKS_SENDING)
        self._blank: Chunk | None = None  # for probes
        self._readers: dict[int, _Reader] = {}
        self._turns: deque[_Serving] = deque()  # what has blocks left to pack
        self._sending: set[_Sending] = set()

    def serve(self, gate: ExportGate | None) -> None:
        self._gate = gate

    @property
    def num_chunks_taken(self) -> int:
        return self._chunks.num_taken

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    # -------------------------------------------------------------------------------- from the readers

    def take_message(self, link_id: int, data: bytes) -> None:
        try:
            message = source_decoder.decode(data)
        except msgspec.MsgspecError as error:
            logger.warning("a reader sent a request that this version cannot read: %s", error)
            return
        match message:
            case ReadRequest():
                self._take_request(link_id, message)
            case ProbeRequest():
                self._take_probe(link_id, message)
            case ReadAbort(read_id):
                self._abort(link_id, read_id)
            case Goodbye():
                self._drop(link_id)

    def _take_request(self, link_id: int, request: ReadRequest) -> None:
        reader = self._reader(link_id, request.reader_address)
        if reader is None:
            return
        try:
            blocks = self._check(request)
            prepared = self._prepare(blocks)
        except KvRelayError as error:
            self._tell(reader, ReadFailed(request.read_id, info_of(error)))
            return
        serving = _Serving(reader, request.read_id, blocks, prepared, request.chunk_blocks)
        reader.servings[request.read_id] = serving
        if serving.is_packed:
            self._send_words(serving)
        else:
            self._turns.append(serving)
            self._pack_next()

    def _check(self, request: ReadRequest) -> Blocks:
        """Raises TicketRejectedError, LeaseExpiredError or TransferError."""
        gate = self._gate
        if gate is None:
            raise LeaseExpiredError("no ticket of this source is open; prefill again")
        if len(request.blocks) % 8:
            raise TransferError("a reader sent block numbers that this version cannot read")
        blocks = np.frombuffer(request.blocks, np.int64).copy()
        gate.check_export(self._decode(request.ticket), request.group, blocks.tolist())
        check_block_range(blocks, self._memory.num_blocks, "the source's")
        if not 0 < request.chunk_blocks * self._copier.block_bytes <= self._copier.chunk_bytes:
            raise TransferError(f"chunks of {request.chunk_blocks} blocks are larger than this source's")
        if len(blocks) > request.chunk_blocks * MAX_CHUNKS:
            raise TransferError(f"{len(blocks)} blocks are too many for one read; ask for fewer")
        return blocks

    def _decode(self, encoded: msgspec.Raw) -> Ticket:
        """The last ticket is kept: reads of one follow each other. Raises TransferError."""
        if bytes(encoded) != self._encoded_ticket:
            try:
                self._ticket = ticket_decoder.decode(encoded)
            except msgspec.MsgspecError as error:
                raise TransferError("a reader sent a ticket that this version cannot read") from error
            self._encoded_ticket = bytes(encoded)
        assert self._ticket is not None
        return self._ticket

    def _prepare(self, blocks: Blocks) -> Any:
        try:
            return self._copier.prepare(blocks)
        except (MemoryError, RuntimeError) as error:
            raise _out_of_memory(error) from error

    def _take_probe(self, link_id: int, request: ProbeRequest) -> None:
        reader = self._reader(link_id, request.reader_address)
        if reader is None:
            return
        try:
            self._blank = self._blank or self._copier.allocate_blank()
        except (MemoryError, RuntimeError) as error:
            self._tell(reader, ReadFailed(request.read_id, info_of(_out_of_memory(error))))
            return
        blank = self._blank.first(min(max(request.chunk_bytes, 1), self._copier.chunk_bytes))
        for index in range(PROBE_CHUNKS):
            self._worker.send(reader.peer, make_tag(CHUNK, request.read_id, index), blank, lambda _: None)

    def _reader(self, link_id: int, address: bytes) -> _Reader | None:
        known = self._readers.get(link_id)
        if known is not None:
            return known
        try:
            peer = self._worker.connect(address, lambda: self._drop(link_id))
        except TransferError as error:
            logger.warning("a reader cannot be answered: %s", error.message)
            return None
        reader = self._readers[link_id] = _Reader(link_id, peer)
        return reader

    def _abort(self, link_id: int, read_id: int) -> None:
        reader = self._readers.get(link_id)
        serving = None if reader is None else reader.servings.pop(read_id, None)
        if serving is not None:
            self._forget(serving)

    def _drop(self, link_id: int) -> None:
        """Its sends end as failed, which frees their chunks."""
        reader = self._readers.pop(link_id, None)
        if reader is None:
            return
        for serving in reader.servings.values():
            self._forget(serving)
        self._worker.disconnect(reader.peer)

    def _forget(self, serving: _Serving) -> None:
        serving.is_wanted = False
        if serving in self._turns:
            self._turns.remove(serving)

    # -------------------------------------------------------------------------------- packing and sending

    def check_progress(self) -> None:
        """Drops readers that have not taken a chunk for too long."""
        late = {sending.serving.reader.link_id for sending in self._sending if self._is_late(sending)}
        for link_id in late:
            logger.warning("a reader took no chunk for %.0f s; its connection is closed", SEND_DEADLINE_S)
            self._drop(link_id)

    def _is_late(self, sending: _Sending) -> bool:
        return self._clock.now() - sending.since_s >= SEND_DEADLINE_S

    def _pack_next(self) -> None:
        """One chunk of the next read in turn whose reader may have one more; then UCX has its turn."""
        serving = next((one for one in self._turns if one.reader.num_sending < MAX_CHUNKS_PER_READER), None)
        if serving is None:
            return
        try:
            chunk = self._chunks.take()
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            self._fail(serving, _out_of_memory(error))
            return
        if chunk is not None:
            self._turns.remove(serving)
            self._pack(serving, chunk)
            if self._turns:
                self._worker.post(self._pack_next)

    def _pack(self, serving: _Serving, chunk: Chunk) -> None:
        index = serving.next_index
        blocks = serving.prepared[serving.num_packed : serving.num_packed + serving.chunk_blocks]
        serving.num_packed += len(blocks)
        serving.next_index += 1
        serving.reader.num_sending += 1
        if not serving.is_packed:
            self._turns.append(serving)
        sending = _Sending(serving, chunk, self._clock.now())
        self._sending.add(sending)
        size_bytes = len(blocks) * self._copier.block_bytes
        self._copier.gather(blocks, chunk, lambda: self._send(sending, index, size_bytes))

    def _send(self, sending: _Sending, index: int, size_bytes: int) -> None:
        serving = sending.serving
        if not serving.is_wanted:
            self._end_sending(sending)
            return
        tag = make_tag(CHUNK, serving.read_id, index)
        self._worker.send(
            serving.reader.peer, tag, sending.chunk.first(size_bytes), lambda _: self._end_sending(sending)
        )
        if serving.is_packed and index + 1 == serving.next_index:
            self._send_words(serving)

    def _end_sending(self, sending: _Sending) -> None:
        """Taken, or failed with the connection, which `_drop` is told of."""
        self._sending.remove(sending)
        sending.serving.reader.num_sending -= 1
        self._chunks.give_back(sending.chunk)
        self._pack_next()

    def _send_words(self, serving: _Serving) -> None:
        del serving.reader.servings[serving.read_id]
        words = self._memory.words.read_after_copy(serving.blocks)
        self._tell(serving.reader, ReadDone(serving.read_id, words.tobytes()))

    def _fail(self, serving: _Serving, error: TransferError) -> None:
        del serving.reader.servings[serving.read_id]
        self._forget(serving)
        self._tell(serving.reader, ReadFailed(serving.read_id, info_of(error)))

    def _tell(self, reader: _Reader, message: ReaderMessage) -> None:
        self._worker.send_message(reader.peer, TO_READER, reader.link_id, msgspec.msgpack.encode(message))


def _out_of_memory(error: Exception) -> TransferError:
    return TransferError(f"the source has no memory for staging chunks: {error}")
