"""Measures how fast KV blocks can move on this machine: by memcpy, and by each connector. GB/s are 10^9 bytes a second.

Uses the connectors themselves on two pools in one process; imports torch. Knows no model.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from msgspec import Struct

from kvrelay_core.clock import MonotonicClock
from kvrelay_core.errors import DeadlineError, TransferError
from kvrelay_core.request import AttemptId
from kvrelay_transfer.connectors.base import BlockRead, PeerInfo, TransferState
from kvrelay_transfer.connectors.shm import ShmConnector
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.pool_memory import PoolMemory
from kvrelay_transfer.ticket import KvTicket, LeaseTerms

# 4 MiB a block, as of a model of 8 B parameters in bfloat16 with 32 tokens.
LAYOUT = KvLayout("bfloat16", num_layers=32, num_kv_heads=8, block_tokens=32, head_dim=128)
NUM_BLOCKS = 33
_REPEATS = 5
_DEADLINE_S = 60.0


class Speed(Struct, frozen=True):
    """`first_gb_per_s` is the first copy, which touches every page; `gb_per_s` the best of the later ones."""

    first_gb_per_s: float
    gb_per_s: float


def measure(copy: Callable[[], object], size_bytes: int) -> Speed:
    rates = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        copy()
        rates.append(size_bytes / (time.perf_counter() - started_s) / 1e9)
    return Speed(rates[0], max(rates[1:]))


def probe_memcpy(size_bytes: int) -> Speed:
    source = np.ones(size_bytes, np.uint8)
    destination = np.empty(size_bytes, np.uint8)
    return measure(lambda: ctypes.memmove(destination.ctypes.data, source.ctypes.data, size_bytes), size_bytes)


def probe_shm(num_blocks: int = NUM_BLOCKS) -> tuple[Speed, int]:
    """The shm connector between two pools; also the bytes of one copy."""
    clock = MonotonicClock()
    source = PoolMemory.allocate(LAYOUT, num_blocks, "cpu", os.urandom(16))
    reader = PoolMemory.allocate(LAYOUT, num_blocks, "cpu", os.urandom(16))
    source.tensor.fill_(1)
    blocks = tuple(range(1, num_blocks))
    size_bytes = len(blocks) * LAYOUT.block_bytes
    with tempfile.TemporaryDirectory(prefix="kvrelay-probe-") as folder:
        serving = ShmConnector(source, clock, Path(folder) / "pool")
        reading = ShmConnector(reader, clock, None)
        try:
            offer = serving.offer()
            assert offer is not None
            peer = PeerInfo("probe", source.engine_epoch, b"", LAYOUT, (offer,))
            link = reading.connect(peer, offer)
            _wait(lambda: link.probed_gb_per_s() is not None)

            def copy() -> None:
                transfer = link.read(BlockRead(_ticket(source.engine_epoch), 0, blocks, blocks))
                _wait(lambda: transfer.poll().is_terminal)
                if transfer.poll() is not TransferState.DONE:
                    raise transfer.error or TransferError("the probe's read failed")

            return measure(copy, size_bytes), size_bytes
        finally:
            reading.close()
            serving.close()
            source.close()
            reader.close()


def _wait(is_done: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + _DEADLINE_S
    while not is_done():
        if time.monotonic() > give_up_s:
            raise DeadlineError(f"the probe did not end within {_DEADLINE_S:g} s")
        time.sleep(0.0001)


def _ticket(epoch: bytes) -> KvTicket:
    attempt = AttemptId("probe", "probe", 0)
    return KvTicket("probe", "probe", "probe", epoch, attempt, b"", LAYOUT, (), 0, b"", LeaseTerms())


def probe_grpc(size_bytes: int) -> Speed:
    """A byte stream over loopback in messages of 4 MiB, as the grpc connector uses."""
    with _StreamServer(size_bytes) as address, grpc.insecure_channel(address, options=_OPTIONS) as channel:
        call: Any = channel.unary_stream(_StreamServer.METHOD)
        return measure(lambda: sum(len(piece) for piece in call(b"", timeout=_DEADLINE_S)), size_bytes)


_PIECE_BYTES = 4 << 20
_OPTIONS = [("grpc.max_receive_message_length", 2 * _PIECE_BYTES)]


class _StreamServer:
    """Sends `size_bytes` to whoever calls, from an event loop on a thread of its own, as a service would."""

    METHOD = "/kvrelay.Probe/Stream"

    def __init__(self, size_bytes: int) -> None:
        self._num_pieces = size_bytes // _PIECE_BYTES
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc-probe", daemon=True)
        self._server: Any = None

    def __enter__(self) -> str:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(_DEADLINE_S)
        return f"127.0.0.1:{port}"

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0), self._loop).result(_DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        self._server = grpc.aio.server()
        handler: Any = grpc.unary_stream_rpc_method_handler(self._stream)
        service, _, method = self.METHOD.lstrip("/").partition("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        port: int = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    async def _stream(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        piece = bytes(_PIECE_BYTES)
        for _ in range(self._num_pieces):
            yield piece
