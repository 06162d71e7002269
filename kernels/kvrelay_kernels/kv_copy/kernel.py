"""Copies of blocks and rows in Triton; also run in Triton's interpreter on the CPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.kv_copy.rows import RowSpacing
from kvrelay_kernels.launch import Launch, launch_for

# Enough to fill NVLink (H200: 362 GB/s of 396 at rows of 16 KiB, as with 64 smaller programs), and as few as that, to
# leave the GPU to the steps that run meanwhile.
NUM_ROW_PROGRAMS: Final = 16
# Columns of a tile of rows: few classes, since each is a compilation.
_ROW_CLASSES: Final = ("long rows", "rows", "short rows")


@triton.jit
def _copy_spans_kernel(
    source_ptr, out_ptr, source_index_ptr, out_index_ptr, span,
    IS_INDEXED_SOURCE: tl.constexpr, IS_INDEXED_OUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(0).to(tl.int64)
    out = source
    if IS_INDEXED_SOURCE:
        source = tl.load(source_index_ptr + source).to(tl.int64)
    if IS_INDEXED_OUT:
        out = tl.load(out_index_ptr + out).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < span
    words = tl.load(source_ptr + source * span + columns, mask=mask)
    tl.store(out_ptr + out * span + columns, words, mask=mask)


@triton.jit(do_not_specialize=[
    "num_rows", "rows_per_pair", "inner", "row_units", "num_pairs",
    "source_outer", "source_inner", "out_outer", "out_inner",
])  # fmt: skip
def _copy_rows_kernel(
    source_ptr, out_ptr, offsets_ptr, num_pairs, num_rows, rows_per_pair, inner, row_units,
    source_outer, source_inner, out_outer, out_inner,
    ALIGNMENT: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Lengths and strides count units of ALIGNMENT bytes, which are WORDS elements: so the compiler sees how wide it
    # may load. A tile is ROWS x COLUMNS elements; programs take tiles in turn.
    row_words = row_units * WORDS
    column_tiles = tl.cdiv(row_words, COLUMNS)
    num_tiles = tl.cdiv(num_rows, ROWS) * column_tiles
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
        column = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
        is_row = row < num_rows
        pair = row // rows_per_pair
        outer_row = (row % rows_per_pair) // inner
        inner_row = row % inner
        source_unit = tl.load(offsets_ptr + pair, mask=is_row, other=0) // ALIGNMENT
        out_unit = tl.load(offsets_ptr + num_pairs + pair, mask=is_row, other=0) // ALIGNMENT
        source_word = (source_unit + outer_row * source_outer + inner_row * source_inner) * WORDS
        out_word = (out_unit + outer_row * out_outer + inner_row * out_inner) * WORDS
        mask = is_row[:, None] & (column < row_words)[None, :]
        words = tl.load(source_ptr + (source_word[:, None] + column[None, :]), mask=mask)
        tl.store(out_ptr + (out_word[:, None] + column[None, :]), words, mask=mask)


def copy_blocks(pool: Tensor, sources_B: Tensor, destinations_B: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.copy_blocks`."""
    _copy_spans(pool, sources_B, pool, destinations_B, len(sources_B))


def gather_blocks(pool: Tensor, blocks_B: Tensor, out: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.gather_blocks`."""
    _copy_spans(pool, blocks_B, out, None, len(blocks_B))


def scatter_blocks(data: Tensor, pool: Tensor, blocks_B: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.scatter_blocks`."""
    _copy_spans(data, None, pool, blocks_B, len(blocks_B))


def copy_rows(source: Tensor | int, out: Tensor, offsets_2P: Tensor, spacing: RowSpacing, alignment: int) -> None:
    """See `kvrelay_kernels.kv_copy.op.copy_rows`."""
    launch = RowLaunch.of(source, out, offsets_2P, spacing, alignment)
    if launch is not None:
        launch.compile_and_run()


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """One launch of the kernel that copies rows: its tensors, integers and constants, in the order of its arguments."""

    tensors: tuple[Tensor | _DevicePointer, ...]
    integers: tuple[int, ...]
    constants: tuple[int, ...]
    num_warps: int

    @classmethod
    def of(
        cls, source: Tensor | int, out: Tensor, offsets_2P: Tensor, spacing: RowSpacing, alignment: int
    ) -> RowLaunch | None:
        """None where there is nothing to copy."""
        num_pairs = offsets_2P.shape[1]
        if num_pairs == 0:
            return None
        word = _WORDS[min(8, alignment)]
        launch = _row_launch(spacing.row_bytes // word.itemsize, out.device)
        source_rows = _DevicePointer(source, word) if isinstance(source, int) else source.view(word)
        integers = (
            num_pairs,
            num_pairs * spacing.num_rows,
            spacing.num_rows,
            spacing.inner,
            spacing.row_bytes // alignment,
            spacing.source_outer_stride // alignment,
            spacing.source_inner_stride // alignment,
            spacing.out_outer_stride // alignment,
            spacing.out_inner_stride // alignment,
        )
        constants = (alignment, alignment // word.itemsize, launch.rows, launch.tile)
        return cls((source_rows, out.view(word), offsets_2P), integers, constants, launch.num_warps)

    @property
    def columns(self) -> int:
        """Of a tile, which name its class."""
        return self.constants[-1]

    @property
    def largest_int(self) -> int:
        return max(self.integers)

    def compile_and_run(self) -> Any:
        """On the current stream. The compiled kernel; None from Triton's interpreter."""
        arguments = (*self.tensors, *self.integers, *self.constants)
        return _copy_rows_kernel[(NUM_ROW_PROGRAMS,)](*arguments, num_warps=self.num_warps)

    def run(self, compiled: Any, stream: torch.cuda.Stream) -> None:
        """What `compile_and_run` returned for arguments of the same kind."""
        arguments = (*self.tensors, *self.integers, *self.constants)
        compiled[(NUM_ROW_PROGRAMS, 1, 1)](*arguments, stream=stream.cuda_stream)


def _row_launch(row_words: int, device: torch.device) -> Launch:
    """The longest tile that rows of `row_words` fill; for shorter ones several rows at once."""
    launches = [launch_for("kv_copy", name, device) for name in _ROW_CLASSES]
    return next((launch for launch in launches if launch.tile <= row_words), launches[-1])


_WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class _DevicePointer:
    """What Triton asks of a tensor argument, for memory that no tensor of ours covers."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _copy_spans(
    source: Tensor, source_index_B: Tensor | None, out: Tensor, out_index_B: Tensor | None, num_blocks: int
) -> None:
    if num_blocks == 0:
        return
    source_words, out_words = _as_words(source), _as_words(out)
    span = source_words.shape[1]
    launch = launch_for("kv_copy", "span", source.device)
    _copy_spans_kernel[(num_blocks, triton.cdiv(span, launch.tile))](
        source_words,
        out_words,
        source_index_B,
        out_index_B,
        span,
        IS_INDEXED_SOURCE=source_index_B is not None,
        IS_INDEXED_OUT=out_index_B is not None,
        TILE=launch.tile,
        num_warps=launch.num_warps,
    )


def _as_words(blocks: Tensor) -> Tensor:
    """Blocks as rows of the widest integers that divide them: what the bytes mean does not matter."""
    assert blocks.is_contiguous()
    bytes_BS = blocks.view(blocks.shape[0], -1).view(torch.uint8)
    for dtype in (torch.int64, torch.int32, torch.int16):
        if bytes_BS.shape[1] % dtype.itemsize == 0:
            return bytes_BS.view(dtype)
    return bytes_BS
