"""RMS normalisation over the last dimension: the public functions, dispatched by device."""

from __future__ import annotations

from torch import Tensor

from kvrelay_kernels.norm import reference


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last dimension, as a new tensor.

    Leading dimensions are free ([N, D], or [N, H, D] for a norm of each head). Computed in float32,
    returned in the dtype of `x_ND`. The weight is of that dtype, or float32.
    """
    if x_ND.is_cuda:
        from kvrelay_kernels.norm import kernel

        return kernel.rms_norm(x_ND, weight_D, eps)
    return reference.rms_norm(x_ND, weight_D, eps)


def add_rms_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual); the sum is the residual of the next layer."""
    if x_ND.is_cuda:
        from kvrelay_kernels.norm import kernel

        return kernel.add_rms_norm(x_ND, residual_ND, weight_D, eps)
    return reference.add_rms_norm(x_ND, residual_ND, weight_D, eps)
