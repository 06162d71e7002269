"""Rotary position embedding in torch: the CPU path and the oracle of the kernel.

Knows nothing of frequencies or scaling: those are in the table of cosines and sines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(q_NHD: Tensor, k_NKD: Tensor, positions_N: Tensor, cos_sin_PD: Tensor) -> tuple[Tensor, Tensor]:
    """See `kvrelay_kernels.rope.op.apply_rope`."""
    cos_N1C, sin_N1C = cos_sin_PD.index_select(0, positions_N).unsqueeze(1).chunk(2, dim=-1)
    return _rotate(q_NHD, cos_N1C, sin_N1C), _rotate(k_NKD, cos_N1C, sin_N1C)


def _rotate(x_NHD: Tensor, cos_N1C: Tensor, sin_N1C: Tensor) -> Tensor:
    first_NHC, second_NHC = x_NHD.float().chunk(2, dim=-1)
    out_NHD = torch.empty(x_NHD.shape, dtype=torch.float32, device=x_NHD.device)
    out_first_NHC, out_second_NHC = out_NHD.chunk(2, dim=-1)
    torch.mul(first_NHC, cos_N1C, out=out_first_NHC).addcmul_(second_NHC, sin_N1C, value=-1)
    torch.mul(second_NHC, cos_N1C, out=out_second_NHC).addcmul_(first_NHC, sin_N1C)
    return out_NHD.to(x_NHD.dtype)
