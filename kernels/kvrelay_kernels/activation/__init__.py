"""Activations of the feed-forward network."""

from kvrelay_kernels.activation.op import silu_mul

__all__ = ["silu_mul"]
