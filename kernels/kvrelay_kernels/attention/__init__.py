"""Attention over the paged KV pool: causal, in windows, and both ways within images."""

from kvrelay_kernels.attention.batch import AttentionBatch
from kvrelay_kernels.attention.op import paged_attention

__all__ = ["AttentionBatch", "paged_attention"]
