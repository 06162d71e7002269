"""Gated activations in torch: the CPU path and the oracle of the kernel."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, silu


def silu_mul(gate_up_N2F: Tensor) -> Tensor:
    """See `kvrelay_kernels.activation.op.silu_mul`."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return silu(gate_NF).mul_(up_NF)


def gelu_tanh_mul(gate_up_N2F: Tensor) -> Tensor:
    """See `kvrelay_kernels.activation.op.gelu_tanh_mul`."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return gelu(gate_NF, approximate="tanh").mul_(up_NF)
