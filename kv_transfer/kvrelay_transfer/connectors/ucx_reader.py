"""The reader's side of the ucx connector, as its thread runs it: chunks that arrive are unpacked into the pool.

A chunk is received into memory of ours and scattered from there by this thread alone, so a read that was given up is
over as soon as no scatter of it is under way, whatever the source still sends. Chunks that nobody waits for any more
are received into waste, so that their source gets its memory back.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from kvrelay_core.clock import Clock
from kvrelay_core.error_info import error_of
from kvrelay_core.errors import KvRelayError, TransferError
from kvrelay_transfer.connectors.ucx_chunks import Chunk, ChunkCopier, ChunkPool
from kvrelay_transfer.connectors.ucx_messages import ReadDone, ReadFailed, new_id, next_id, reader_decoder
from kvrelay_transfer.connectors.ucx_worker import Arrival, Job, UcxWorker
from kvrelay_transfer.fence import WordArray

logger = logging.getLogger(__name__)

MAX_CHUNKS_RECEIVING = 4
RECEIVE_DEADLINE_S = 30.0
_MAX_WASTE_BYTES = 256 << 20


class Inbound(Protocol):
    """Something that chunks arrive for: a read, or a probe."""

    def size_of(self, index: int) -> int | None:
        """In bytes; None if that chunk is not expected, for instance because it has been here."""

    def note_arrival(self, index: int) -> None:
        """The chunk is being received."""

    def land(self, index: int, chunk: Chunk, then: Job) -> None:
        """The chunk is here. `then` is to be called when it is no longer needed."""

    def lose_connection(self) -> None:
        """The source does not send on."""

    def take_words(self, words: WordArray) -> None: ...

    def fail(self, error: KvRelayError) -> None: ...


@dataclass(slots=True, eq=False)
class _Receiving:
    arrival: Arrival
    inbound: Inbound
    chunk: Chunk
    since_s: float


class UcxReader:
    def __init__(self, worker: UcxWorker, copier: ChunkCopier, clock: Clock) -> None:
        self.worker = worker
        self.copier = copier
        self._clock = clock
        self._chunks = ChunkPool(copier.allocate, MAX_CHUNKS_RECEIVING)
        self._inbound: dict[int, Inbound] = {}
        self._waiting: deque[Arrival] = deque()  # for a free chunk
        self._receiving: set[_Receiving] = set()
        self._last_id = new_id()

    @property
    def num_chunks_taken(self) -> int:
        return self._chunks.num_taken

    def add(self, inbound: Inbound) -> int:
        """Chunks for the id that it returns go to `inbound`, until `remove`."""
        self._last_id = next_id(self._last_id)
        self._inbound[self._last_id] = inbound
        return self._last_id

    def remove(self, read_id: int) -> None:
        self._inbound.pop(read_id, None)

    def is_receiving(self, read_id: int) -> bool:
        return any(receiving.arrival.number == read_id for receiving in self._receiving)

    def check_progress(self) -> None:
        """Closes connections in which a chunk has been half here for too long: it takes memory that others wait for."""
        since_s = self._clock.now() - RECEIVE_DEADLINE_S
        for receiving in [receiving for receiving in self._receiving if receiving.since_s <= since_s]:
            receiving.inbound.lose_connection()

    def take_message(self, link_id: int, data: bytes) -> None:
        try:
            message = reader_decoder.decode(data)
        except msgspec.MsgspecError as error:
            logger.warning("a source sent an answer that this version cannot read: %s", error)
            return
        inbound = self._inbound.get(message.read_id)
        if inbound is None:
            return
        match message:
            case ReadDone(_, words) if len(words) % 8 == 0:
                inbound.take_words(np.frombuffer(words, np.uint64))
            case ReadDone():
                inbound.fail(TransferError("the source sent words that this version cannot read"))
            case ReadFailed(_, error_info):
                inbound.fail(error_of(error_info))

    def take_chunk(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)
        self._receive_waiting()

    def _receive_waiting(self) -> None:
        while self._waiting:
            arrival = self._waiting[0]
            inbound = self._inbound.get(arrival.number)
            if inbound is not None and inbound.size_of(arrival.index) != arrival.size_bytes:
                inbound.fail(TransferError("the source sent a chunk that was not asked for"))
                inbound = None
            if inbound is None:
                self._waste(self._waiting.popleft())
                continue
            try:
                chunk = self._chunks.take()
            except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                inbound.fail(TransferError(f"there is no memory for staging chunks: {error}"))
                continue
            if chunk is None:
                return
            self._receive(self._waiting.popleft(), inbound, chunk)

    def _receive(self, arrival: Arrival, inbound: Inbound, chunk: Chunk) -> None:
        inbound.note_arrival(arrival.index)
        receiving = _Receiving(arrival, inbound, chunk, self._clock.now())
        self._receiving.add(receiving)
        self.worker.receive(arrival, chunk.first(arrival.size_bytes), lambda error: self._received(receiving, error))

    def _received(self, receiving: _Receiving, error: TransferError | None) -> None:
        self._receiving.remove(receiving)
        arrival, inbound, chunk = receiving.arrival, receiving.inbound, receiving.chunk
        is_wanted = self._inbound.get(arrival.number) is inbound
        if is_wanted and error is None:
            inbound.land(arrival.index, chunk, lambda: self._free(chunk))
            return
        self._free(chunk)
        if is_wanted and error is not None:
            inbound.fail(error)

    def _free(self, chunk: Chunk) -> None:
        self._chunks.give_back(chunk)
        self._receive_waiting()

    def _waste(self, arrival: Arrival) -> None:
        """Whatever it is, its sender waits until it was taken."""
        if arrival.size_bytes > _MAX_WASTE_BYTES:
            logger.warning("left a UCX message of %d bytes that nobody asked for", arrival.size_bytes)
            return
        self.worker.receive(arrival, self.worker.wrap(np.empty(arrival.size_bytes, np.uint8)), lambda _: None)
