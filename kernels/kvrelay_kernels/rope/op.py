"""Rotary position embedding: the public function, dispatched by device."""

from __future__ import annotations

from torch import Tensor

from kvrelay_kernels.rope import reference


def apply_rope(q_NHD: Tensor, k_NKD: Tensor, positions_N: Tensor, cos_sin_PD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the queries and keys rotated to their positions, as new contiguous tensors.

    The halves of each head are a pair (Llama, Qwen), not neighbouring elements. `cos_sin_PD` is float32:
    for each position D/2 cosines, then D/2 sines. `q_NHD` and `k_NKD` may be slices of one projection.
    """
    if q_NHD.is_cuda:
        from kvrelay_kernels.rope import kernel

        return kernel.apply_rope(q_NHD, k_NKD, positions_N, cos_sin_PD)
    return reference.apply_rope(q_NHD, k_NKD, positions_N, cos_sin_PD)
