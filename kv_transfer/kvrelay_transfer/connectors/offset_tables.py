"""Pinned and device memory for the offsets that a copy kernel reads, kept from copy to copy.

Pinning memory and asking for device memory cost more than posting a copy, so a table is used again when the copy that
it was for has ended.
"""

from __future__ import annotations

import numpy as np
import torch

from kvrelay_transfer.connectors.base import Blocks
from kvrelay_transfer.cuda_runtime import CudaRuntime

_FIRST_TABLES = 4
_LEAST_PAIRS = 4096


def has_fired(event: torch.cuda.Event) -> bool:
    """Never blocks. Raises RuntimeError when the CUDA context has failed."""
    return bool(event.query())  # type: ignore[no-untyped-call]


class OffsetTable:
    def __init__(self, runtime: CudaRuntime, stream: torch.cuda.Stream, num_pairs: int) -> None:
        self._runtime = runtime
        self._stream = stream
        self._pinned = torch.empty(2 * num_pairs, dtype=torch.int64, pin_memory=True)
        self._host: Blocks = self._pinned.numpy()
        self._on_device = torch.empty(2 * num_pairs, dtype=torch.int64, device=stream.device)
        self.num_pairs = num_pairs
        self.used_until: torch.cuda.Event | None = None

    def upload(self, remote_offsets: Blocks, local_offsets: Blocks) -> torch.Tensor:
        """Posts the copy of the offsets, [2, num_pairs] on the device. The table is in use until `used_until` fires."""
        num_pairs = len(remote_offsets)
        np.copyto(self._host[:num_pairs], remote_offsets)
        np.copyto(self._host[num_pairs : 2 * num_pairs], local_offsets)
        offsets = self._on_device[: 2 * num_pairs].view(2, num_pairs)
        self._runtime.copy(offsets.data_ptr(), self._pinned.data_ptr(), offsets.nbytes, self._stream)
        return offsets


class OffsetTables:
    def __init__(self, runtime: CudaRuntime, stream: torch.cuda.Stream) -> None:
        self._runtime = runtime
        self._stream = stream
        self._tables = [self._create(_LEAST_PAIRS) for _ in range(_FIRST_TABLES)]

    def take(self, num_pairs: int) -> OffsetTable:
        """One that no copy uses. The caller sets `used_until` when it has posted its copy."""
        for table in self._tables:
            is_free = table.used_until is None or has_fired(table.used_until)
            if is_free and num_pairs <= table.num_pairs:
                return table
        table = self._create(num_pairs)
        self._tables.append(table)
        return table

    def _create(self, num_pairs: int) -> OffsetTable:
        return OffsetTable(self._runtime, self._stream, 1 << max(_LEAST_PAIRS, num_pairs).bit_length())
