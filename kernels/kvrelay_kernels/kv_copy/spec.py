"""Specs of the copies of blocks and rows."""

from __future__ import annotations

import torch

from kvrelay_kernels.kv_copy import reference
from kvrelay_kernels.kv_copy.rows import RowSpacing
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


# Rows of a peer's block (its `heads`, `tokens`) that become rows of ours: `heads` and `tokens` of each are copied.
_ROW_SHAPES = {
    "whole blocks": {"pairs": 5, "planes": 1, "heads": (1, 1, 1), "tokens": (8, 8, 8), "dim": 640, "alignment": 16},
    "odd": {"pairs": 3, "planes": 3, "heads": (3, 2, 1), "tokens": (4, 6, 2), "dim": 5, "alignment": 2},
    "head slices": {"pairs": 4, "planes": 4, "heads": (4, 2, 2), "tokens": (16, 16, 16), "dim": 64, "alignment": 16},
    "token slices": {"pairs": 7, "planes": 6, "heads": (2, 2, 2), "tokens": (64, 16, 16), "dim": 16, "alignment": 8},
    "short rows": {"pairs": 40, "planes": 3, "heads": (2, 2, 2), "tokens": (2, 8, 2), "dim": 16, "alignment": 16},
    "single row": {"pairs": 1, "planes": 1, "heads": (1, 1, 1), "tokens": (1, 1, 1), "dim": 16, "alignment": 4},
    "empty": {"pairs": 0, "planes": 2, "heads": (2, 2, 2), "tokens": (4, 4, 4), "dim": 16, "alignment": 16},
}


def _build_rows(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """Two pools of blocks [planes, heads, tokens, dim]. Each pair copies from a random block to a block of its own."""
    pairs, planes, dim_bytes = shape["pairs"], shape["planes"], shape["dim"] * dtype.itemsize
    (source_heads, out_heads, heads), (source_tokens, out_tokens, tokens) = shape["heads"], shape["tokens"]
    source_bytes = planes * source_heads * source_tokens * dim_bytes
    out_bytes = planes * out_heads * out_tokens * dim_bytes
    num_blocks = pairs + 2
    first_row = (source_heads - heads) * source_tokens * dim_bytes + (source_tokens - tokens) * dim_bytes
    offsets_2P = torch.stack(
        [
            torch.randint(0, num_blocks, (pairs,), generator=generator) * source_bytes + first_row,
            torch.randperm(num_blocks, generator=generator)[:pairs] * out_bytes,
        ]
    )
    return {
        "source": torch.randint(0, 256, (num_blocks * source_bytes,), generator=generator, dtype=torch.uint8),
        "out": torch.zeros(num_blocks * out_bytes, dtype=torch.uint8),
        "offsets_2P": offsets_2P,
        "spacing": RowSpacing(
            outer=planes,
            inner=heads,
            row_bytes=tokens * dim_bytes,
            source_outer_stride=source_heads * source_tokens * dim_bytes,
            source_inner_stride=source_tokens * dim_bytes,
            out_outer_stride=out_heads * out_tokens * dim_bytes,
            out_inner_stride=out_tokens * dim_bytes,
        ),
        "alignment": shape["alignment"],
    }


SPECS = (
    OpSpec(
        name="copy_rows",
        schema="copy_rows(source, out, offsets_2P, spacing, alignment) -> None",
        reference=reference.copy_rows,
        kernel="kvrelay_kernels.kv_copy.kernel:copy_rows",
        shapes=_ROW_SHAPES,
        build=_build_rows,
        tolerances=_TOLERANCES,
        changed=("out",),
    ),
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
