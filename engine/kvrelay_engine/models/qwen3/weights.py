"""Qwen3's tensors: those of the dense decoder, and two norm weights of one head in each layer."""

from __future__ import annotations

from dataclasses import replace

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.dense_weights import read_attention, read_decoder
from kvrelay_engine.models.layers.attention import AttentionWeights
from kvrelay_engine.models.layers.decoder import DecoderWeights
from kvrelay_engine.weight_reader import WeightReader


def read_weights(reader: WeightReader, config: ModelConfig) -> DecoderWeights:
    return read_decoder(reader, config, _read_attention)


def _read_attention(reader: WeightReader, config: ModelConfig, prefix: str) -> AttentionWeights:
    return replace(
        read_attention(reader, config, prefix),
        query_norm_D=reader.read(f"{prefix}.q_norm.weight", (config.head_dim,)),
        key_norm_D=reader.read(f"{prefix}.k_norm.weight", (config.head_dim,)),
    )
