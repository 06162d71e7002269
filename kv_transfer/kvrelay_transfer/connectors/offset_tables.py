"""Pinned and device memory for the offsets that a copy kernel reads, kept from copy to copy.

Pinning memory and asking for device memory cost more than posting a copy, so a table is used again when the copy that
it was for has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvrelay_transfer.cuda_runtime import CudaRuntime

_FIRST_TABLES = 4
_LEAST_PAIRS = 4096


def has_fired(event: torch.cuda.Event) -> bool:
    """Never blocks. Raises RuntimeError when the CUDA context has failed."""
    return bool(event.query())  # type: ignore[no-untyped-call]


@dataclass(slots=True, eq=False)
class OffsetTable:
    """Offsets [2, num_pairs] on either side."""

    pinned: torch.Tensor
    on_device: torch.Tensor
    used_until: torch.cuda.Event | None = None

    def host(self, num_pairs: int) -> npt.NDArray[np.int64]:
        """To be filled."""
        return self.pinned[: 2 * num_pairs].numpy().reshape(2, num_pairs)

    def upload(self, num_pairs: int, runtime: CudaRuntime, stream: torch.cuda.Stream) -> torch.Tensor:
        """Posts the copy. The host's side must stay as it is until `used_until` has fired."""
        table = self.on_device[: 2 * num_pairs]
        runtime.copy(table.data_ptr(), self.pinned.data_ptr(), table.nbytes, stream)
        return table.view(2, num_pairs)


class OffsetTables:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables = [self._create(_LEAST_PAIRS) for _ in range(_FIRST_TABLES)]

    def take(self, num_pairs: int) -> OffsetTable:
        """One that no copy uses. The caller sets `used_until` when it has posted its copy."""
        for table in self._tables:
            is_free = table.used_until is None or has_fired(table.used_until)
            if is_free and 2 * num_pairs <= table.pinned.numel():
                return table
        table = self._create(num_pairs)
        self._tables.append(table)
        return table

    def _create(self, num_pairs: int) -> OffsetTable:
        size = 2 << max(_LEAST_PAIRS, num_pairs).bit_length()
        pinned = torch.empty(size, dtype=torch.int64, pin_memory=True)
        return OffsetTable(pinned, torch.empty(size, dtype=torch.int64, device=self._device))
