"""How fast KV blocks can move within this process: by memcpy, and by the shm connector alone. 10^9 bytes a second."""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
