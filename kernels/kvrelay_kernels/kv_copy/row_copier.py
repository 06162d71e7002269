"""`copy_rows` on one stream, for those who launch it often.

Triton's own launch derives from all arguments which compilation they belong to, and asks what the current stream is:
60 us of the host, a tenth of what a copy of 256 MiB over NVLink takes. Here a compilation is remembered by the few
properties of the arguments that select it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvrelay_kernels.kv_copy.kernel import RowLaunch
from kvrelay_kernels.kv_copy.rows import RowSpacing

# Triton compiles integers of more bits for 64, and knows of pointers whether they are so aligned.
_MAX_INT32 = (1 << 31) - 1
_POINTER_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class _Variant:
    alignment: int
    columns: int
    are_aligned: tuple[bool, ...]
    fits_int32: bool


class RowCopier:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._compiled: dict[_Variant, Any] = {}

    def copy(self, source: int, out: Tensor, offsets_2P: Tensor, spacing: RowSpacing, alignment: int) -> None:
        """As `kvrelay_kernels.kv_copy.op.copy_rows`; the stream's device must be the current one."""
        launch = RowLaunch.of(source, out, offsets_2P, spacing, alignment)
        if launch is None:
            return
        addresses = (source, out.data_ptr(), offsets_2P.data_ptr())
        are_aligned = tuple(address % _POINTER_ALIGNMENT == 0 for address in addresses)
        variant = _Variant(alignment, launch.columns, are_aligned, launch.largest_int <= _MAX_INT32)
        compiled = self._compiled.get(variant)
        if compiled is None:
            with torch.cuda.stream(self._stream):
                self._compiled[variant] = launch.compile_and_run()
        else:
            launch.run(compiled, self._stream)
