"""Qwen2.5-VL's text side: the dense decoder with plain attention; its M-RoPE follows from the config."""

from __future__ import annotations

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.layers.attention import Attention
from kvrelay_engine.models.layers.decoder import Decoder, DecoderWeights
from kvrelay_engine.models.layers.linear import MakeLinear


def build(config: ModelConfig, weights: DecoderWeights, make_linear: MakeLinear) -> Decoder:
    return Decoder(config, weights, Attention, make_linear)
