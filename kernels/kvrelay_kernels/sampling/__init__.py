"""The steps from logits to a token: penalties, filters, and a draw with counter-based noise."""

from kvrelay_kernels.sampling.noise import noise_key
from kvrelay_kernels.sampling.op import apply_penalties, filter_thresholds, gumbel_argmax

__all__ = ["apply_penalties", "filter_thresholds", "gumbel_argmax", "noise_key"]
