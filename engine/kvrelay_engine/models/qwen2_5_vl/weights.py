"""Qwen2.5-VL's text tensors: those of the dense decoder, under either name that checkpoints have had for it."""

from __future__ import annotations

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.dense_weights import read_attention, read_decoder
from kvrelay_engine.models.layers.decoder import DecoderWeights
from kvrelay_engine.weight_reader import WeightReader

VISION_PREFIXES = ("visual.", "model.visual.")
_NESTED_PREFIX = "model.language_model"


def read_weights(reader: WeightReader, config: ModelConfig) -> DecoderWeights:
    is_nested = reader.has(f"{_NESTED_PREFIX}.embed_tokens.weight")
    return read_decoder(reader, config, read_attention, _NESTED_PREFIX if is_nested else "model")
