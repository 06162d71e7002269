"""Activations of the feed-forward network."""

from kvrelay_kernels.activation.op import gelu_tanh_mul, silu_mul

__all__ = ["gelu_tanh_mul", "silu_mul"]
