"""Gated activations in Triton; also runs in Triton's interpreter on the CPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrelay_kernels.launch import launch_for


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, size, row_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < size
    gate = tl.load(gate_up_ptr + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + size + columns, mask=mask, other=0.0)
    # Rounded in between, as two separate ops would.
    silu = (gate * tl.sigmoid(gate)).to(up.dtype)
    tl.store(out_ptr + row * size + columns, silu * up, mask=mask)


def silu_mul(gate_up_N2F: Tensor) -> Tensor:
    """See `kvrelay_kernels.activation.op.silu_mul`."""
    num_rows, width = gate_up_N2F.shape
    size = width // 2
    assert gate_up_N2F.stride(-1) == 1
    out_NF = torch.empty((num_rows, size), dtype=gate_up_N2F.dtype, device=gate_up_N2F.device)
    if num_rows:
        launch = launch_for("silu_mul", "rows", gate_up_N2F.device)
        _silu_mul_kernel[(num_rows, triton.cdiv(size, launch.tile))](
            gate_up_N2F, out_NF, size, gate_up_N2F.stride(0), TILE=launch.tile, num_warps=launch.num_warps
        )
    return out_NF
