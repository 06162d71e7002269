"""Specs of the whole-block copies."""

from __future__ import annotations

import torch

from kvrelay_kernels.kv_copy import reference
from kvrelay_kernels.spec import EXACT, FLOAT_TOLERANCES, Inputs, OpSpec, Shape

_SHAPES = {
    "aligned": {"blocks": 3, "block": (2, 2, 2, 8, 16)},
    "odd span": {"blocks": 2, "block": (1, 1, 3, 1, 5)},
    "single block": {"blocks": 1, "block": (3, 2, 2, 4, 64)},
    "empty": {"blocks": 0, "block": (2, 2, 1, 4, 16)},
}
_TOLERANCES = dict.fromkeys(FLOAT_TOLERANCES, EXACT)


def _pool(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(2 * shape["blocks"] + 2, *shape["block"], generator=generator).to(dtype)


def _build_copy(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    pool = _pool(shape, dtype, generator)
    order = torch.randperm(len(pool), generator=generator)
    num_blocks = shape["blocks"]
    return {"pool": pool, "sources_B": order[:num_blocks], "destinations_B": order[num_blocks : 2 * num_blocks]}


def _build_gather(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    pool = _pool(shape, dtype, generator)
    blocks_B = torch.randint(0, len(pool), (shape["blocks"],), generator=generator)
    return {"pool": pool, "blocks_B": blocks_B, "out": torch.zeros(shape["blocks"], *shape["block"], dtype=dtype)}


def _build_scatter(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    pool = _pool(shape, dtype, generator)
    return {
        "data": torch.randn(shape["blocks"], *shape["block"], generator=generator).to(dtype),
        "pool": pool,
        "blocks_B": torch.randperm(len(pool), generator=generator)[: shape["blocks"]],
    }


SPECS = (
    OpSpec(
        name="copy_blocks",
        schema="copy_blocks(pool, sources_B, destinations_B) -> None",
        reference=reference.copy_blocks,
        kernel="kvrelay_kernels.kv_copy.kernel:copy_blocks",
        shapes=_SHAPES,
        build=_build_copy,
        tolerances=_TOLERANCES,
        changed=("pool",),
    ),
    OpSpec(
        name="gather_blocks",
        schema="gather_blocks(pool, blocks_B, out) -> None",
        reference=reference.gather_blocks,
        kernel="kvrelay_kernels.kv_copy.kernel:gather_blocks",
        shapes=_SHAPES,
        build=_build_gather,
        tolerances=_TOLERANCES,
        changed=("out",),
    ),
    OpSpec(
        name="scatter_blocks",
        schema="scatter_blocks(data, pool, blocks_B) -> None",
        reference=reference.scatter_blocks,
        kernel="kvrelay_kernels.kv_copy.kernel:scatter_blocks",
        shapes=_SHAPES,
        build=_build_scatter,
        tolerances=_TOLERANCES,
        changed=("pool",),
    ),
)
