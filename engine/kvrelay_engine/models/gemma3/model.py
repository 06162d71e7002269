"""Gemma 3: the decoder with normalised queries and keys; the rest of what it has follows from the config."""

from __future__ import annotations

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.layers.decoder import Decoder, DecoderWeights
from kvrelay_engine.models.layers.linear import MakeLinear
from kvrelay_engine.models.layers.qk_norm import QkNormAttention


def build(config: ModelConfig, weights: DecoderWeights, make_linear: MakeLinear) -> Decoder:
    return Decoder(config, weights, QkNormAttention, make_linear)
