"""Gemma 3's text tensors, under each of the names that checkpoints have had for them.

A norm multiplies by one plus its weight: the sum is made here, and kept in float32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.dense_weights import read_attention, read_mlp
from kvrelay_engine.models.layers.decoder import DecoderWeights, LayerWeights
from kvrelay_engine.weight_reader import WeightReader

VISION_PREFIXES = tuple(
    f"{model}{part}." for model in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)
# Prefix of the model, and what the output projection is called beside it.
_NAMES = (
    ("model.language_model", "lm_head"),
    ("language_model.model", "language_model.lm_head"),
    ("model", "lm_head"),
)


def read_weights(reader: WeightReader, config: ModelConfig) -> DecoderWeights:
    prefix, output = next((names for names in _NAMES if reader.has(f"{names[0]}.embed_tokens.weight")), _NAMES[-1])
    vocabulary = (config.vocab_size, config.hidden_size)
    if config.tie_embeddings:
        reader.ignore(f"{output}.weight")
    return DecoderWeights(
        embedding_VE=reader.read(f"{prefix}.embed_tokens.weight", vocabulary),
        layers=[_read_layer(reader, config, f"{prefix}.layers.{index}") for index in range(config.num_layers)],
        norm_E=_read_norm(reader, f"{prefix}.norm", config.hidden_size),
        output_VE=None if config.tie_embeddings else reader.read(f"{output}.weight", vocabulary),
    )


def _read_layer(reader: WeightReader, config: ModelConfig, prefix: str) -> LayerWeights:
    def read_norm(name: str) -> Tensor:
        return _read_norm(reader, f"{prefix}.{name}", config.hidden_size)

    attention = f"{prefix}.self_attn"
    return LayerWeights(
        input_norm_E=read_norm("input_layernorm"),
        attention=replace(
            read_attention(reader, config, attention),
            query_norm_D=_read_norm(reader, f"{attention}.q_norm", config.head_dim),
            key_norm_D=_read_norm(reader, f"{attention}.k_norm", config.head_dim),
        ),
        mlp_norm_E=read_norm("pre_feedforward_layernorm"),
        mlp=read_mlp(reader, config, f"{prefix}.mlp"),
        attention_output_norm_E=read_norm("post_attention_layernorm"),
        mlp_output_norm_E=read_norm("post_feedforward_layernorm"),
    )


def _read_norm(reader: WeightReader, name: str, size: int) -> Tensor:
    return reader.read(f"{name}.weight", (size,), torch.float32).add_(1.0)
