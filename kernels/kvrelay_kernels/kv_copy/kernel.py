"""Whole-block copies in Triton; also runs in Triton's interpreter on the CPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.launch import launch_for


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


def copy_blocks(pool: Tensor, sources_B: Tensor, destinations_B: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.copy_blocks`."""
    _copy_spans(pool, sources_B, pool, destinations_B, len(sources_B))


def gather_blocks(pool: Tensor, blocks_B: Tensor, out: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.gather_blocks`."""
    _copy_spans(pool, blocks_B, out, None, len(blocks_B))


def scatter_blocks(data: Tensor, pool: Tensor, blocks_B: Tensor) -> None:
    """See `kvrelay_kernels.kv_copy.op.scatter_blocks`."""
    _copy_spans(data, None, pool, blocks_B, len(blocks_B))


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
