"""A reader's link to one source over UCX, its reads and its probe.

`read`, `poll`, `abort` and `close` belong to the step loop and never wait; everything with an underscore runs on the
connector's thread, which alone makes a transfer terminal.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import msgspec

from kvrelay_core.clock import Clock
from kvrelay_core.errors import DeadlineError, InternalError, KvRelayError, TransferError, UnsupportedError
from kvrelay_transfer.connectors.base import (
    BlockRead,
    EndedTransfer,
    PeerLink,
    ReadWindow,
    Transfer,
    TransferState,
    check_block_range,
)
from kvrelay_transfer.connectors.ucx_chunks import Chunk
from kvrelay_transfer.connectors.ucx_messages import (
    MAX_CHUNKS,
    PROBE_CHUNKS,
    TO_SOURCE,
    Goodbye,
    ProbeRequest,
    ReadAbort,
    ReadRequest,
    SourceMessage,
    UcxEndpoint,
    new_id,
)
from kvrelay_transfer.connectors.ucx_reader import UcxReader
from kvrelay_transfer.connectors.ucx_worker import Done, Job, UcxPeer
from kvrelay_transfer.fence import WordArray
from kvrelay_transfer.ticket import Ticket

# Between GPUs reads are long: a new one waits for nothing, but costs as much work as a chunk.
WINDOWS = {"cpu": ReadWindow(), "cuda": ReadWindow(max_reads=4, max_read_bytes=256 << 20)}
CONNECT_S = 2.0
PROBE_S = 5.0


class UcxLink(PeerLink):
    def __init__(
        self, peer_id: str, endpoint: UcxEndpoint, reader: UcxReader, num_blocks: int, clock: Clock, deadline_s: float
    ) -> None:
        """`num_blocks` of our own pool."""
        self.peer_id = peer_id
        self.reader = reader
        self.is_closed = False
        self.window = WINDOWS[reader.copier.device]
        self.chunk_bytes = min(endpoint.chunk_bytes, reader.copier.chunk_bytes)
        self._address = endpoint.worker_address
        self._num_blocks = num_blocks
        self._clock = clock
        self._deadline_s = deadline_s
        self._peer: UcxPeer | None = None
        self._link_id = 0
        self._ticket: Ticket | None = None  # the last one, and how it is encoded
        self._encoded_ticket = msgspec.Raw()
        self._transfers: set[UcxTransfer] = set()
        self._probe = _Probe(self, clock)

    def connect(self) -> None:
        """Waits for no answer of the peer. Raises TransferError."""
        connected: Future[None] = Future()
        self.reader.worker.post(lambda: self._connect_for(connected))
        try:
            connected.result(CONNECT_S)
        except TimeoutError as error:
            self.close()
            raise TransferError(f"UCX did not begin to connect to {self.peer_id} within {CONNECT_S:.0f} s") from error

    def read(self, read: BlockRead) -> Transfer:
        if self.is_closed:
            return EndedTransfer(TransferError(f"the link to {self.peer_id} is closed"), TransferState.TORN_DOWN)
        try:
            self._check(read)
        except KvRelayError as error:
            return EndedTransfer(error)
        transfer = UcxTransfer(self, read, self._clock, self._clock.now() + self._deadline_s)
        self.reader.worker.post(transfer.start)
        return transfer

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.reader.worker.post(self._close)

    def probed_gb_per_s(self) -> float | None:
        return self._probe.gb_per_s()

    def _check(self, read: BlockRead) -> None:
        if read.slices is not None:
            raise UnsupportedError("the ucx connector moves whole blocks; give both workers the same KV layout")
        check_block_range(read.local, self._num_blocks, "our")
        if len(read.local) != len(read.remote):
            raise TransferError(f"{len(read.remote)} blocks cannot go into {len(read.local)}")
        if len(read.local) > self.chunk_blocks * MAX_CHUNKS:
            raise TransferError(f"{len(read.local)} blocks are too many for one read; ask for fewer")

    @property
    def chunk_blocks(self) -> int:
        return self.chunk_bytes // self.reader.copier.block_bytes

    # -------------------------------------------------------------------------------------- on the thread

    def _connect_for(self, connected: Future[None]) -> None:
        try:
            self.connected_peer()
        except TransferError as error:
            connected.set_exception(error)
            return
        self._probe.start()
        connected.set_result(None)

    def connected_peer(self) -> UcxPeer:
        """Connects anew after the connection was lost. Raises TransferError."""
        if self._peer is None:
            self._link_id = new_id()
            self._peer = self.reader.worker.connect(self._address, self.lose)
        return self._peer

    def send(self, message: SourceMessage, on_done: Done = lambda _: None) -> None:
        """Raises TransferError."""
        peer = self.connected_peer()
        self.reader.worker.send_message(peer, TO_SOURCE, self._link_id, msgspec.msgpack.encode(message), on_done)

    def encode(self, ticket: Ticket) -> msgspec.Raw:
        """Reads of one ticket follow each other."""
        if ticket is not self._ticket:
            self._ticket, self._encoded_ticket = ticket, msgspec.Raw(msgspec.msgpack.encode(ticket))
        return self._encoded_ticket

    def add(self, transfer: UcxTransfer) -> None:
        self._transfers.add(transfer)

    def remove(self, transfer: UcxTransfer) -> None:
        self._transfers.discard(transfer)

    def tell_given_up(self, read_id: int) -> None:
        if self._peer is not None:
            self.send(ReadAbort(read_id))

    def lose(self) -> None:
        self._disconnect(TransferError(f"the connection to {self.peer_id} was lost"))

    def _close(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            goodbye = msgspec.msgpack.encode(Goodbye())
            worker = self.reader.worker
            worker.send_message(peer, TO_SOURCE, self._link_id, goodbye, lambda _: worker.disconnect(peer))
        self._tear_down(TransferError(f"the connection to {self.peer_id} was closed"))

    def _disconnect(self, error: TransferError) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            self.reader.worker.disconnect(peer)
        self._tear_down(error)

    def _tear_down(self, error: TransferError) -> None:
        self._probe.fail(error)
        for transfer in list(self._transfers):
            transfer.end(TransferState.TORN_DOWN, error)


class UcxTransfer(Transfer):
    def __init__(self, link: UcxLink, read: BlockRead, clock: Clock, deadline_at_s: float) -> None:
        self._link = link
        self._read = read
        self._clock = clock
        self._deadline_at_s = deadline_at_s
        self._state = TransferState.PENDING
        self._is_expired = False
        # From here on the thread's own.
        self._read_id = 0
        self._chunk_blocks = link.chunk_blocks
        self._local_blocks: Any = None  # as the copier takes them
        self._arrived: set[int] = set()
        self._num_landed = 0
        self._num_scattering = 0
        self._source_words: WordArray | None = None
        self._end: tuple[TransferState, KvRelayError | None] | None = None

    def poll(self) -> TransferState:
        if self._state is TransferState.PENDING:
            if not self._link.reader.worker.is_running:
                self.error = InternalError("the thread of the ucx connector is gone")
                self._state = TransferState.TORN_DOWN
            elif not self._is_expired and self._clock.now() >= self._deadline_at_s:
                self._is_expired = True
                self._link.reader.worker.post(self._expire)
        return self._state

    def abort(self) -> None:
        if self._state is TransferState.PENDING:
            self._link.reader.worker.post(lambda: self._give_up(TransferError("the read was given up")))

    # -------------------------------------------------------------------------------------- on the thread

    def start(self) -> None:
        self._read_id = self._link.reader.add(self)
        self._link.add(self)
        read, link = self._read, self._link
        address, ticket = link.reader.worker.address, link.encode(read.ticket)
        remote = read.remote.tobytes()
        try:
            link.send(ReadRequest(self._read_id, address, ticket, read.group, remote, link.chunk_blocks))
            # While the source works.
            self._local_blocks = link.reader.copier.prepare(read.local)
        except TransferError as error:
            self.fail(error)
        except (MemoryError, RuntimeError) as error:
            self._give_up(TransferError(f"there is no memory for the numbers of our blocks: {error}"))

    def size_of(self, index: int) -> int | None:
        begin = index * self._chunk_blocks
        num_blocks = min(self._chunk_blocks, len(self._read.local) - begin)
        return None if index in self._arrived or num_blocks <= 0 else num_blocks * self._link.reader.copier.block_bytes

    def land(self, index: int, chunk: Chunk, then: Job) -> None:
        self._num_scattering += 1

        def scattered() -> None:
            self._num_scattering -= 1
            self._num_landed += 1
            then()
            self._finish()

        begin = index * self._chunk_blocks
        blocks = self._local_blocks[begin : begin + self._chunk_blocks]
        self._link.reader.copier.scatter(chunk, blocks, scattered)

    def note_arrival(self, index: int) -> None:
        self._arrived.add(index)

    def take_words(self, words: WordArray) -> None:
        num_blocks = len(self._read.remote)
        if len(words) != num_blocks:
            self.fail(TransferError(f"the source sent {len(words)} words for {num_blocks} blocks"))
            return
        self._source_words = words
        self._finish()

    def fail(self, error: KvRelayError) -> None:
        self.end(TransferState.FAILED, error)

    def end(self, state: TransferState, error: KvRelayError | None) -> None:
        """Terminal as soon as no scatter of it is under way; the first reason counts."""
        if self._end is None:
            self._end = (state, error)
            self._link.reader.remove(self._read_id)
            self._link.remove(self)
        self._finish()

    def _finish(self) -> None:
        if self._num_scattering or self._state.is_terminal:
            return
        is_complete = self._num_landed * self._chunk_blocks >= len(self._read.local)
        if self._end is None and is_complete and self._source_words is not None:
            self.words = self._source_words
            self.end(TransferState.DONE, None)
        elif self._end is not None:
            state, self.error = self._end
            self._state = state  # last: who sees it sees the rest

    def _expire(self) -> None:
        self._give_up(DeadlineError(f"{self._link.peer_id} did not send the blocks before the read's deadline"))
        if self._link.reader.is_receiving(self._read_id):
            self._link.lose()  # only the end of the connection ends a chunk that is half here

    def lose_connection(self) -> None:
        self._link.lose()

    def _give_up(self, error: KvRelayError) -> None:
        if self._end is None:
            self.fail(error)
            self._link.tell_given_up(self._read_id)


class _Probe:
    """The same chunks twice; the first time wires up and warms up. Then the speed from when the first of them waits for
    us until the last one is here."""

    def __init__(self, link: UcxLink, clock: Clock) -> None:
        self._link = link
        self._clock = clock
        self._deadline_at_s = clock.now() + PROBE_S
        self._gb_per_s: float | None = None
        self._is_warm = False
        self._begin()

    def gb_per_s(self) -> float | None:
        """None while it runs; 0.0 if the source did not answer in time, or not to the end."""
        if self._gb_per_s is None and self._clock.now() >= self._deadline_at_s:
            return 0.0
        return self._gb_per_s

    # -------------------------------------------------------------------------------------- on the thread

    def start(self) -> None:
        """Raises TransferError."""
        self._read_id = self._link.reader.add(self)
        address = self._link.reader.worker.address
        self._link.send(ProbeRequest(self._read_id, address, self._link.chunk_bytes))

    def size_of(self, index: int) -> int | None:
        return None if index in self._arrived or index >= PROBE_CHUNKS else self._link.chunk_bytes

    def note_arrival(self, index: int) -> None:
        if not self._arrived:
            self._first_at_s = time.perf_counter()
        self._arrived.add(index)

    def land(self, index: int, chunk: Chunk, then: Job) -> None:
        self._num_landed += 1
        then()
        if self._num_landed == PROBE_CHUNKS:
            self._end_round()

    def lose_connection(self) -> None:
        self._link.lose()

    def take_words(self, words: WordArray) -> None:
        """A probe has none."""

    def fail(self, error: KvRelayError) -> None:
        if self._gb_per_s is None:
            self._end(0.0)

    def _begin(self) -> None:
        self._read_id = 0
        self._arrived: set[int] = set()
        self._num_landed = 0
        self._first_at_s = 0.0

    def _end_round(self) -> None:
        if self._is_warm:
            size_bytes = PROBE_CHUNKS * self._link.chunk_bytes
            self._end(size_bytes / (time.perf_counter() - self._first_at_s) / 1e9)
            return
        self._link.reader.remove(self._read_id)
        self._is_warm = True
        self._begin()
        try:
            self.start()
        except TransferError as error:
            self.fail(error)

    def _end(self, gb_per_s: float) -> None:
        self._link.reader.remove(self._read_id)
        self._gb_per_s = gb_per_s
