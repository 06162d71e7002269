"""RMS normalisation in Triton; also runs in Triton's interpreter on the CPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.launch import launch_for


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    num_rows,
    inner_rows,
    x_stride_outer,
    x_stride_inner,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE_TILE: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, SIZE_TILE)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    x_offset = (rows // inner_rows).to(tl.int64) * x_stride_outer + (rows % inner_rows) * x_stride_inner
    out_offset = rows.to(tl.int64)[:, None] * size + columns[None, :]
    x = tl.load(x_ptr + x_offset[:, None] + columns[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + out_offset, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out_offset, x, mask=mask)
    x = x.to(tl.float32)
    mean_square = tl.sum(x * x, axis=1) / size
    weight = tl.load(weight_ptr + columns, mask=columns < size, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(mean_square + eps)[:, None] * weight[None, :]
    tl.store(out_ptr + out_offset, normed.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `kvrelay_kernels.norm.op.rms_norm`."""
    return _launch(x_ND, None, weight_D, eps)[0]


def add_rms_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kvrelay_kernels.norm.op.add_rms_norm`."""
    return _launch(x_ND, residual_ND.contiguous(), weight_D, eps)


def _launch(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    # Slices of a projection, [N, H, D] with any two outer strides, are read where they are.
    rows_OID = x if x.dim() == 3 and x.stride(-1) == 1 else x.reshape(-1, 1, size)
    num_outer, num_inner, _ = rows_OID.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out) if residual is not None else out
    num_rows = num_outer * num_inner
    if num_rows:
        launch = launch_for("norm", "rows", x.device)
        size_tile = triton.next_power_of_2(size)
        rows_tile = max(1, launch.tile // size_tile)
        _rms_norm_kernel[(triton.cdiv(num_rows, rows_tile),)](
            rows_OID,
            residual if residual is not None else rows_OID,
            weight_D,
            out,
            total,
            num_rows,
            num_inner,
            rows_OID.stride(0),
            rows_OID.stride(1),
            size,
            eps,
            HAS_RESIDUAL=residual is not None,
            ROWS=rows_tile,
            SIZE_TILE=size_tile,
            num_warps=launch.num_warps,
        )
    return out, total
