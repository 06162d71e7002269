"""Qwen3's config.json. The head size does not follow from the hidden size; 128 where it is not given."""

from __future__ import annotations

from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.dense_config import read_dense_config

ARCHITECTURE = "Qwen3ForCausalLM"


def read_config(fields: ConfigFields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias", False)
    return read_dense_config(
        fields,
        ARCHITECTURE,
        head_dim=fields.integer("head_dim", 128),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )
