"""Llama's tensors: those of the dense decoder, nothing more."""

from __future__ import annotations

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.dense_weights import read_attention, read_decoder
from kvrelay_engine.models.layers.decoder import DecoderWeights
from kvrelay_engine.weight_reader import WeightReader


def read_weights(reader: WeightReader, config: ModelConfig) -> DecoderWeights:
    return read_decoder(reader, config, read_attention)
