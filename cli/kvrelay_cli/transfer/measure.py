"""One connector at several span sizes, each beside a plain copy of as many bytes made in turn with the reads.

GB/s are 10^9 bytes a second. Every read's bytes and words are verified, outside of what is timed.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from msgspec import Struct

from kvrelay_cli.transfer.pair import Pair
from kvrelay_cli.transfer.source import Source

REPEATS = 5
LATENCY_REPEATS = 20


class Row(Struct, frozen=True, kw_only=True):
    """A connector at one span size. `first_gb_per_s` is the first read, which touches every page of a new pool;
    `gb_per_s` and `plain_gb_per_s` are medians of the later ones and of plain copies beside them."""

    connector: str
    span_bytes: int
    size_bytes: int
    connect_s: float
    first_gb_per_s: float
    gb_per_s: float
    plain_gb_per_s: float
    one_span_s: float  # median time of a read of one span

    @property
    def share_of_plain(self) -> float:
        return self.gb_per_s / self.plain_gb_per_s


class Devices(Struct, frozen=True):
    source: str
    reader: str


def devices_for(device: str) -> Devices:
    """Two GPUs where there are two: reads go from cuda:1 to cuda:0."""
    if device == "cpu":
        return Devices("cpu", "cpu")
    return Devices("cuda:1" if torch.cuda.device_count() > 1 else "cuda:0", "cuda:0")


def measure_spans(
    name: str, source: Source, devices: Devices, span_sizes: Sequence[int], size_bytes: int, repeats: int = REPEATS
) -> Iterator[Row]:
    """Raises ConfigError or TransferError where the connector cannot work here."""
    for span_bytes in span_sizes:
        with tempfile.TemporaryDirectory(prefix="kvb-", dir="/tmp") as folder:
            pair = Pair(name, source, span_bytes, size_bytes, devices.reader, Path(folder))
            try:
                yield _measure(name, pair, span_bytes, plain_copy(devices, pair.size_bytes), repeats)
            finally:
                pair.close()


def _measure(name: str, pair: Pair, span_bytes: int, copy: Callable[[], None], repeats: int) -> Row:
    first_s = timed(pair.read_in_pieces)
    pair.check()
    copy()
    read_s, copied_s = [], []
    for _ in range(repeats):
        pair.scatter()
        copied_s.append(timed(copy))
        read_s.append(timed(pair.read_in_pieces))
        pair.check()
    one_span_s = []
    for _ in range(LATENCY_REPEATS):
        pair.scatter()
        one_span_s.append(timed(pair.read_one))
        pair.check(1)
    return Row(
        connector=name,
        span_bytes=span_bytes,
        size_bytes=pair.size_bytes,
        connect_s=pair.connect_s,
        first_gb_per_s=pair.size_bytes / first_s / 1e9,
        gb_per_s=pair.size_bytes / statistics.median(read_s) / 1e9,
        plain_gb_per_s=pair.size_bytes / statistics.median(copied_s) / 1e9,
        one_span_s=statistics.median(one_span_s),
    )


def plain_copy(devices: Devices, size_bytes: int) -> Callable[[], None]:
    """Of contiguous memory that was touched before: on CPU a memcpy by one core, between GPUs one by a copy engine."""
    if devices.reader == "cpu":
        source, destination = np.ones(size_bytes, np.uint8), np.ones(size_bytes, np.uint8)

        def copy_on_cpu() -> None:
            ctypes.memmove(destination.ctypes.data, source.ctypes.data, size_bytes)

        return copy_on_cpu
    source_tensor = torch.ones(size_bytes, dtype=torch.uint8, device=devices.source)
    destination_tensor = torch.ones(size_bytes, dtype=torch.uint8, device=devices.reader)

    def copy_on_gpu() -> None:
        destination_tensor.copy_(source_tensor, non_blocking=True)
        torch.cuda.synchronize(devices.source)
        torch.cuda.synchronize(devices.reader)

    return copy_on_gpu


def timed(act: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    act()
    return time.perf_counter() - started_s
