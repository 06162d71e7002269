"""Gated activations: the public function, dispatched by device."""

from __future__ import annotations

from torch import Tensor

from kvrelay_kernels.activation import reference


def silu_mul(gate_up_N2F: Tensor) -> Tensor:
    """Returns silu(gate) * up as [N, F]; `gate_up_N2F` holds F gates, then F ups, in each row."""
    if gate_up_N2F.is_cuda:
        from kvrelay_kernels.activation import kernel

        return kernel.silu_mul(gate_up_N2F)
    return reference.silu_mul(gate_up_N2F)


def gelu_tanh_mul(gate_up_N2F: Tensor) -> Tensor:
    """Returns gelu(gate) * up as [N, F], with the approximation of GELU by a hyperbolic tangent."""
    if gate_up_N2F.is_cuda:
        from kvrelay_kernels.activation import kernel

        return kernel.gelu_tanh_mul(gate_up_N2F)
    return reference.gelu_tanh_mul(gate_up_N2F)
