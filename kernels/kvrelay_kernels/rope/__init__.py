"""Rotary position embedding."""

from kvrelay_kernels.rope.op import apply_rope

__all__ = ["apply_rope"]
