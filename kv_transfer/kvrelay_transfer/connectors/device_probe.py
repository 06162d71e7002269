"""How fast a peer's memory is read over this link: one span, twice, on the copy stream; the second copy is measured.

Posted when it is made and never waited for. Knows addresses only.
"""

from __future__ import annotations

import torch

from kvrelay_transfer.connectors.device_copy import DeviceCopier
from kvrelay_transfer.connectors.offset_tables import has_fired

PROBE_BYTES = 64 << 20  # a fifth of a millisecond over NVLink, 3 ms over PCIe


class DeviceProbe:
    def __init__(self, copier: DeviceCopier, source: int, size_bytes: int) -> None:
        """Reads at most `size_bytes` at `source`; whatever is written there meanwhile does no harm. Where not even the
        scratch memory is free, nothing is measured."""
        self._copier = copier
        with torch.cuda.device(copier.device), torch.cuda.stream(copier.stream):
            self._scratch = self._allocate(min(PROBE_BYTES, size_bytes))
            self._begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            copier.copy_span(source, self._scratch)
            self._begin.record(copier.stream)
            copier.copy_span(source, self._scratch)
            self.end.record(copier.stream)
        self._gb_per_s: float | None = None

    def gb_per_s(self) -> float | None:
        """10^9 bytes a second; None while it runs, 0.0 where nothing could be measured."""
        if self._gb_per_s is None and has_fired(self.end):
            seconds = self._begin.elapsed_time(self.end) / 1e3
            size_bytes = self._scratch.numel()
            self._scratch = self._scratch.new_empty(0)
            self._gb_per_s = size_bytes / seconds / 1e9 if size_bytes else 0.0
        return self._gb_per_s

    def _allocate(self, size_bytes: int) -> torch.Tensor:
        try:
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._copier.device)
        except torch.OutOfMemoryError:
            return torch.empty(0, dtype=torch.uint8, device=self._copier.device)
