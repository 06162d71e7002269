"""Where equally spaced rows lie in two buffers."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

# The widest access of a thread; wider alignment brings nothing.
MAX_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class RowSpacing:
    """`outer` x `inner` rows of `row_bytes` for each pair of offsets; strides in bytes on either side."""

    outer: int
    inner: int
    row_bytes: int
    source_outer_stride: int
    source_inner_stride: int
    out_outer_stride: int
    out_inner_stride: int

    @classmethod
    def one_row(cls, row_bytes: int) -> RowSpacing:
        return cls(1, 1, row_bytes, 0, 0, 0, 0)

    @property
    def num_rows(self) -> int:
        return self.outer * self.inner

    def alignment(self, *others_bytes: int) -> int:
        """Bytes to which all rows are aligned, where all offsets and both buffers are to `others_bytes`; at most 16."""
        strides = (self.source_outer_stride, self.source_inner_stride, self.out_outer_stride, self.out_inner_stride)
        common = gcd(MAX_ALIGNMENT_BYTES, self.row_bytes, *strides, *others_bytes)
        return common & -common
