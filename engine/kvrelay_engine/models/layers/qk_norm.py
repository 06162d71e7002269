"""Attention that normalises every query head and every key head before RoPE."""

from __future__ import annotations

from torch import Tensor

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.layers.attention import Attention, AttentionWeights
from kvrelay_engine.models.layers.linear import MakeLinear
from kvrelay_kernels.norm import rms_norm


class QkNormAttention(Attention):
    def __init__(
        self, config: ModelConfig, weights: AttentionWeights, make_linear: MakeLinear, window: int = 0
    ) -> None:
        super().__init__(config, weights, make_linear, window)
        assert weights.query_norm_D is not None and weights.key_norm_D is not None
        self._query_norm_D = weights.query_norm_D
        self._key_norm_D = weights.key_norm_D
        self._eps = config.rms_norm_eps

    def normalise(self, q_NHD: Tensor, k_NKD: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(q_NHD, self._query_norm_D, self._eps), rms_norm(k_NKD, self._key_norm_D, self._eps)
