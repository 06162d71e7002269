"""Gated activations in Triton; also runs in Triton's interpreter on the CPU."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, no-any-return"
# Triton has no types: a kernel is compiled from its source, not called.

from __future__ import annotations

from typing import Any

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


@triton.jit
def _gelu_tanh_mul_kernel(gate_up_ptr, out_ptr, size, row_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < size
    gate = tl.load(gate_up_ptr + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + size + columns, mask=mask, other=0.0)
    # (1 + tanh(x)) / 2 is sigmoid(2 x); 2 sqrt(2 / pi) = 1.5957691. Bounded where exp(-2 x) would be infinite.
    twice = tl.maximum(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate), -80.0)
    gelu = (gate * tl.sigmoid(twice)).to(up.dtype)
    tl.store(out_ptr + row * size + columns, gelu * up, mask=mask)


def silu_mul(gate_up_N2F: Tensor) -> Tensor:
    """See `kvrelay_kernels.activation.op.silu_mul`."""
    return _launch(_silu_mul_kernel, "silu_mul", gate_up_N2F)


def gelu_tanh_mul(gate_up_N2F: Tensor) -> Tensor:
    """See `kvrelay_kernels.activation.op.gelu_tanh_mul`."""
    return _launch(_gelu_tanh_mul_kernel, "gelu_tanh_mul", gate_up_N2F)


def _launch(kernel: Any, op: str, gate_up_N2F: Tensor) -> Tensor:
    num_rows, width = gate_up_N2F.shape
    size = width // 2
    assert gate_up_N2F.stride(-1) == 1
    out_NF = torch.empty((num_rows, size), dtype=gate_up_N2F.dtype, device=gate_up_N2F.device)
    if num_rows:
        launch = launch_for(op, "rows", gate_up_N2F.device)
        kernel[(num_rows, triton.cdiv(size, launch.tile))](
            gate_up_N2F, out_NF, size, gate_up_N2F.stride(0), TILE=launch.tile, num_warps=launch.num_warps
        )
    return out_NF
