"""Specs of the RMS normalisations."""

from __future__ import annotations

import torch

from kvrelay_kernels.norm import reference
from kvrelay_kernels.spec import FLOAT_TOLERANCES, Inputs, OpSpec, Shape

_SHAPES = {
    "aligned": {"rows": 4, "size": 128},
    "odd": {"rows": 3, "size": 97},
    "single token": {"rows": 1, "size": 64},
    "many small rows": {"rows": 70, "size": 16},
    "empty": {"rows": 0, "size": 64},
}


def _build(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    size = shape["size"]
    return {
        "x_ND": torch.randn(shape["rows"], size, generator=generator).to(dtype),
        "weight_D": torch.rand(size, generator=generator).add(0.5).to(dtype),
        "eps": 1e-6,
    }


def _build_wide_weight(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """A weight that keeps float32 beside narrower activations."""
    inputs = _build(shape, dtype, generator)
    return {**inputs, "weight_D": torch.rand(shape["size"], generator=generator).add(0.5)}


def _build_heads(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Heads as a slice of a wider projection, as QK norm sees them."""
    inputs = _build(shape, dtype, generator)
    wide_NHD = torch.randn(shape["rows"], 5, shape["size"], generator=generator).to(dtype)
    return {**inputs, "x_ND": wide_NHD[:, 1:4]}


def _build_with_residual(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = _build(shape, dtype, generator)
    x_ND = inputs.pop("x_ND")
    return {"x_ND": x_ND, "residual_ND": torch.randn(x_ND.shape, generator=generator).to(dtype), **inputs}


SPECS = (
    OpSpec(
        name="rms_norm",
        schema="rms_norm(x_ND, weight_D, eps) -> x_ND",
        reference=reference.rms_norm,
        kernel="kvrelay_kernels.norm.kernel:rms_norm",
        shapes=_SHAPES,
        build=_build,
        tolerances=FLOAT_TOLERANCES,
    ),
    OpSpec(
        name="rms_norm with a float32 weight",
        schema="rms_norm(x_ND, weight_D, eps) -> x_ND",
        reference=reference.rms_norm,
        kernel="kvrelay_kernels.norm.kernel:rms_norm",
        shapes={"odd": _SHAPES["odd"]},
        build=_build_wide_weight,
        tolerances=FLOAT_TOLERANCES,
    ),
    OpSpec(
        name="rms_norm of heads",
        schema="rms_norm(x_NHD, weight_D, eps) -> x_NHD",
        reference=reference.rms_norm,
        kernel="kvrelay_kernels.norm.kernel:rms_norm",
        shapes=_SHAPES,
        build=_build_heads,
        tolerances=FLOAT_TOLERANCES,
    ),
    OpSpec(
        name="add_rms_norm",
        schema="add_rms_norm(x_ND, residual_ND, weight_D, eps) -> (normed_ND, residual_ND)",
        reference=reference.add_rms_norm,
        kernel="kvrelay_kernels.norm.kernel:add_rms_norm",
        shapes=_SHAPES,
        build=_build_with_residual,
        tolerances=FLOAT_TOLERANCES,
    ),
)
