"""Specs of the sampling steps."""

from __future__ import annotations

import math

import torch

from kvrelay_kernels.sampling import reference
from kvrelay_kernels.sampling.noise import noise_key
from kvrelay_kernels.spec import Inputs, OpSpec, Shape, Tolerance

_SHAPES = {
    "aligned": {"rows": 2, "vocab": 1024},
    "odd": {"rows": 3, "vocab": 1531},
    "single row": {"rows": 1, "vocab": 77},
    "single token": {"rows": 2, "vocab": 1},
    "empty": {"rows": 0, "vocab": 16},
}
_TOLERANCES = {torch.float32: Tolerance(1e-5, 1e-6)}


def _logits(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape["rows"], shape["vocab"], generator=generator).mul(3)


def _cycle(values: list[float], num_rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([values[row % len(values)] for row in range(num_rows)], dtype=dtype)


def _build_penalties(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    logits_RV = _logits(shape, generator)
    num_entries = logits_RV.numel() // 3
    entries_E = torch.randperm(logits_RV.numel(), generator=generator)[:num_entries]
    terms_3E = torch.rand(3, num_entries, generator=generator) + torch.tensor([[-0.5], [0.8], [-0.5]])
    terms_3E[2, ::7] = math.inf
    rows_E = entries_E.div(shape["vocab"], rounding_mode="floor")
    return {"logits_RV": logits_RV, "rows_E": rows_E, "tokens_E": entries_E % shape["vocab"], "terms_3E": terms_3E}


def _build_thresholds(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    rows = shape["rows"]
    return {
        "logits_RV": _logits(shape, generator),
        "temperatures_R": _cycle([0.7, 1.0, 2.5], rows),
        "top_k_R": _cycle([40, 0, 5, 3000], rows, torch.int32),
        "top_p_R": _cycle([0.9, 0.55, 1.0], rows),
        "min_p_R": _cycle([0.0, 0.0, 0.02, 0.3], rows),
    }


def _build_gumbel(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    rows = shape["rows"]
    keys = [noise_key(seed=17 + row, choice=0, position=row) for row in range(rows)]
    return {
        "logits_RV": _logits(shape, generator),
        "temperatures_R": _cycle([0.7, 0.0, 1.5], rows),
        "thresholds_R": _cycle([-math.inf, 0.0, -0.5], rows).clamp(max=-1.0),
        "keys_R2": torch.tensor(keys, dtype=torch.int32).view(rows, 2),
    }


SPECS = (
    OpSpec(
        name="apply_penalties",
        schema="apply_penalties(logits_RV, rows_E, tokens_E, terms_3E) -> None",
        reference=reference.apply_penalties,
        kernel="kvrelay_kernels.sampling.kernel:apply_penalties",
        shapes=_SHAPES,
        build=_build_penalties,
        tolerances=_TOLERANCES,
        changed=("logits_RV",),
    ),
    OpSpec(
        name="filter_thresholds",
        schema="filter_thresholds(logits_RV, temperatures_R, top_k_R, top_p_R, min_p_R) -> thresholds_R",
        reference=reference.filter_thresholds,
        kernel="kvrelay_kernels.sampling.kernel:filter_thresholds",
        shapes=_SHAPES,
        build=_build_thresholds,
        tolerances=_TOLERANCES,
    ),
    OpSpec(
        name="gumbel_argmax",
        schema="gumbel_argmax(logits_RV, temperatures_R, thresholds_R, keys_R2) -> tokens_R",
        reference=reference.gumbel_argmax,
        kernel="kvrelay_kernels.sampling.kernel:gumbel_argmax",
        shapes=_SHAPES,
        build=_build_gumbel,
        tolerances=_TOLERANCES,
    ),
)
