"""The least program that moves as many bytes with ucxx: whole chunks, from one buffer into another.

    seconds = minimal_ucx(span_sizes, size_bytes, source_device, reader_device, repeats)

The size of spans does not matter to it: nothing is packed. One other process; no pool, no words, no deadlines, no
errors. The library's options are the connector's.
"""

from __future__ import annotations

import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvrelay_core.errors import ConfigError
from kvrelay_transfer.connectors.ucx_chunks import CHUNK_BYTES
from kvrelay_transfer.connectors.ucx_library import UcxLibrary

_READY = "ready:"
_REQUEST_TAG, _DATA_TAG = 1, 2


def minimal_ucx(
    span_sizes: Sequence[int], size_bytes: int, source_device: str, reader_device: str, repeats: int
) -> dict[int, float]:
    """By span size, though one measurement serves all: the median of the seconds from a request to its last chunk."""
    source = subprocess.Popen(
        [sys.executable, __file__, source_device, str(size_bytes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert source.stdin is not None and source.stdout is not None
    try:
        line = next((line for line in source.stdout if line.startswith(_READY)), None)
        if line is None:
            raise ConfigError("ucxx is not installed, or finds no transport")
        end = _End(reader_device, size_bytes, fill=0)
        end.connect(bytes.fromhex(line.removeprefix(_READY).strip()))
        own = np.frombuffer(end.address, np.uint8).copy()
        times_s = []
        for _ in range(repeats):
            started_s = time.perf_counter()
            receiving = [end.receive(chunk, _DATA_TAG) for chunk in end.chunks]
            end.wait(end.send(own, _REQUEST_TAG), *receiving)
            times_s.append(time.perf_counter() - started_s)
        assert bool((end.memory == 1).all()), "other bytes came than were sent"
        return dict.fromkeys(span_sizes, statistics.median(times_s[1:]))
    finally:
        source.stdin.close()
        source.wait(30)
        source.stdout.close()


class _End:
    """A worker, its buffer in chunks, and the endpoint to the other one."""

    def __init__(self, device: str, size_bytes: int, fill: int) -> None:
        library = UcxLibrary.load()
        self._api, self._array = library.api, library.array
        self.memory = torch.full((size_bytes,), fill, dtype=torch.uint8, device=device)
        kind = torch.device(device).type
        self.worker: Any = library.make_worker(kind)
        self._endpoint: Any = None
        starts = range(0, size_bytes, CHUNK_BYTES[kind])
        parts = [self.memory[start : start + CHUNK_BYTES[kind]] for start in starts]
        self.chunks: list[Any] = [part.numpy() for part in parts] if kind == "cpu" else parts
        if kind == "cuda":
            torch.cuda.synchronize(device)

    @property
    def address(self) -> bytes:
        return bytes(self.worker.address.tobytes())

    @property
    def is_connected(self) -> bool:
        return self._endpoint is not None

    def connect(self, address: bytes) -> None:
        remote = self._api.UCXAddress.create_from_buffer(address)
        self._endpoint = self._api.UCXEndpoint.create_from_worker_address(self.worker, remote, True)

    def send(self, buffer: Any, tag: int) -> Any:
        return self._endpoint.tag_send(self._array(buffer), self._api.UCXXTag(tag))

    def receive(self, buffer: Any, tag: int) -> Any:
        return self.worker.tag_recv(self._array(buffer), self._api.UCXXTag(tag))

    def probe(self, tag: int) -> Any:
        return self.worker.tag_probe(self._api.UCXXTag(tag))

    def wait(self, *requests: Any) -> None:
        while not all(request.completed for request in requests):
            self.worker.progress()
        for request in requests:
            request.check_error()


def _own(device: str, size_bytes: int) -> None:
    """The source: answers requests until its stdin ends."""
    end = _End(device, size_bytes, fill=1)
    print(_READY, end.address.hex(), flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        end.worker.progress()
        probe = end.probe(_REQUEST_TAG)
        if probe.matched:
            address = np.empty(probe.length, np.uint8)
            end.wait(end.receive(address, _REQUEST_TAG))
            if not end.is_connected:
                end.connect(address.tobytes())
            end.wait(*[end.send(chunk, _DATA_TAG) for chunk in end.chunks])


if __name__ == "__main__":
    _own(sys.argv[1], int(sys.argv[2]))
