"""The grpc connector's way between two processes, without the services: what they do around a read, over loopback.

Pieces go pool -> staging slot -> messages of 2 MiB -> staging slot -> pool, two under way, as in a worker. There is no
ticket, no lease and no retry.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import grpc
import msgspec

from kvrelay_core.errors import DeadlineError, KvRelayError, TransferError
from kvrelay_core.rpc.channel import CHANNEL_OPTIONS, SERVER_OPTIONS
from kvrelay_transfer.connectors.base import BlockRead
from kvrelay_transfer.connectors.grpc import GrpcConnector
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.staging import BlockStaging
from kvrelay_transfer.staging_slots import StagingSlots

SERVICE, METHOD = "kvrelay.TransferBench", "Fetch"
MESSAGE_BYTES = 2 << 20
PIECES_UNDER_WAY = 2
NUM_SLOTS = 4
TIMEOUT_S = 30.0
ARRIVAL_WAIT_S = 0.0002


class StreamServer:
    """Sends the blocks that a caller names, then their fence words. `address` is on loopback."""

    def __init__(self, memory: PoolMemory, staging: BlockStaging, slots: StagingSlots) -> None:
        self._memory = memory
        self._staging = staging
        self._slots = slots
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(slots.num_slots):
            self._free.put(slot)
        self._threads = ThreadPoolExecutor(PIECES_UNDER_WAY, thread_name_prefix="stream-server")
        self._server = grpc.server(self._threads, options=SERVER_OPTIONS)
        handler: Any = grpc.unary_stream_rpc_method_handler(self._send)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _send(self, request: bytes, context: Any) -> Iterator[bytes]:
        blocks: tuple[int, ...] = msgspec.msgpack.decode(request, type=tuple[int, ...])
        slot = self._free.get(timeout=TIMEOUT_S)
        try:
            self._staging.copy_out(blocks, slot)
            with self._slots.slot(slot) as view:
                size_bytes = len(blocks) * self._memory.layout.block_bytes
                for offset in range(0, size_bytes, MESSAGE_BYTES):
                    yield bytes(view[offset : min(offset + MESSAGE_BYTES, size_bytes)])
            yield msgspec.msgpack.encode([self._memory.words.read(block) for block in blocks])
        finally:
            self._free.put(slot)

    def close(self) -> None:
        self._server.stop(0).wait(TIMEOUT_S)
        self._threads.shutdown()


class StreamReader:
    """The socket half of a reading `GrpcConnector`. What arrives waits until `deliver` is called on the thread that
    polls."""

    def __init__(self, slots: StagingSlots) -> None:
        self._slots = slots
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(slots.num_slots):
            self._free.put(slot)
        self._arrived: SimpleQueue[Callable[[GrpcConnector], None]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(PIECES_UNDER_WAY, thread_name_prefix="stream-reader")
        self._channels: dict[str, grpc.Channel] = {}

    def fetch(self, read_id: int, peer_id: str, read: BlockRead) -> None:
        channel = self._channels.get(peer_id)
        if channel is None:
            channel = self._channels[peer_id] = grpc.insecure_channel(peer_id, options=CHANNEL_OPTIONS)
        step = max(1, self._slots.slot_bytes // read.ticket.layout.block_bytes)
        blocks = read.remote_blocks
        starts = range(0, len(blocks), step)
        fetch = _Fetch(read_id, channel.unary_stream(f"/{SERVICE}/{METHOD}"), len(starts))
        for first in starts:
            self._threads.submit(self._fetch_piece, fetch, first, blocks[first : first + step])

    def abort_fetch(self, read_id: int) -> None:
        """Pieces under way end by themselves; the connector gives their slots back."""

    def free_slot(self, slot: int) -> None:
        self._free.put(slot)

    def deliver(self, connector: GrpcConnector) -> None:
        """Hands over what arrives; returns when nothing does. Does not spin: the threads that receive need the
        interpreter."""
        with contextlib.suppress(Empty):
            while True:
                self._arrived.get(timeout=ARRIVAL_WAIT_S)(connector)

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._threads.shutdown(cancel_futures=True)

    def _fetch_piece(self, fetch: _Fetch, first: int, blocks: tuple[int, ...]) -> None:
        try:
            slot, words = self._receive(fetch.call, blocks)
        except KvRelayError as error:
            self._end(fetch, error)
            return
        self._arrived.put(lambda connector: connector.deliver(fetch.read_id, first, slot, words))
        self._end(fetch, None)

    def _receive(self, call: Any, blocks: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        try:
            slot = self._free.get(timeout=TIMEOUT_S)
        except Empty as error:
            raise DeadlineError(f"no staging slot became free within {TIMEOUT_S:g} s") from error
        try:
            with self._slots.slot(slot) as view:
                offset, last = 0, b""
                for message in call(msgspec.msgpack.encode(blocks), timeout=TIMEOUT_S):
                    view[offset : offset + len(last)] = last
                    offset, last = offset + len(last), message
            return slot, msgspec.msgpack.decode(last, type=tuple[int, ...])
        except (grpc.RpcError, ValueError, msgspec.MsgspecError) as error:
            self._free.put(slot)
            reason = error.code() if isinstance(error, grpc.RpcError) else error
            raise TransferError(f"the byte stream broke: {reason}") from error

    def _end(self, fetch: _Fetch, error: KvRelayError | None) -> None:
        if fetch.is_last(error):
            self._arrived.put(lambda connector: connector.end(fetch.read_id, fetch.error))


class _Fetch:
    """One read of several pieces, which end on different threads."""

    def __init__(self, read_id: int, call: Any, num_pieces: int) -> None:
        self.read_id = read_id
        self.call = call
        self.error: KvRelayError | None = None
        self._left = num_pieces
        self._lock = threading.Lock()

    def is_last(self, error: KvRelayError | None) -> bool:
        """One more piece has ended; true for the one that ends the read."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            return self._left == 0
