"""RMS normalisation in torch: the CPU path and the oracle of the kernel. Knows nothing of models."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `kvrelay_kernels.norm.op.rms_norm`."""
    if weight_D.dtype != x_ND.dtype:
        return torch.rms_norm(x_ND.float(), weight_D.shape, weight_D, eps).to(x_ND.dtype)
    return torch.rms_norm(x_ND, weight_D.shape, weight_D, eps)


def add_rms_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kvrelay_kernels.norm.op.add_rms_norm`."""
    total_ND = x_ND + residual_ND
    return rms_norm(total_ND, weight_D, eps), total_ND
