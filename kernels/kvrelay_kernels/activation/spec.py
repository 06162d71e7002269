"""Specs of the gated activations."""

from __future__ import annotations

import torch

from kvrelay_kernels.activation import reference
from kvrelay_kernels.spec import FLOAT_TOLERANCES, Inputs, OpSpec, Shape


def _build(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"gate_up_N2F": torch.randn(shape["rows"], 2 * shape["size"], generator=generator).mul(3).to(dtype)}


_SHAPES = {
    "aligned": {"rows": 4, "size": 1024},
    "odd": {"rows": 3, "size": 1099},
    "single token": {"rows": 1, "size": 56},
    "empty": {"rows": 0, "size": 64},
}

SPECS = (
    OpSpec(
        name="silu_mul",
        schema="silu_mul(gate_up_N2F) -> x_NF",
        reference=reference.silu_mul,
        kernel="kvrelay_kernels.activation.kernel:silu_mul",
        shapes=_SHAPES,
        build=_build,
        tolerances=FLOAT_TOLERANCES,
    ),
    OpSpec(
        name="gelu_tanh_mul",
        schema="gelu_tanh_mul(gate_up_N2F) -> x_NF",
        reference=reference.gelu_tanh_mul,
        kernel="kvrelay_kernels.activation.kernel:gelu_tanh_mul",
        shapes=_SHAPES,
        build=_build,
        tolerances=FLOAT_TOLERANCES,
    ),
)
