"""Llama's config.json. Biases, off in the published models, are one flag for attention and one for the MLP."""

from __future__ import annotations

from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.dense_config import read_dense_config

ARCHITECTURE = "LlamaForCausalLM"


def read_config(fields: ConfigFields) -> ModelConfig:
    attention_bias = fields.flag("attention_bias", False)
    return read_dense_config(
        fields,
        ARCHITECTURE,
        head_dim=fields.integer("head_dim") if fields.has("head_dim") else None,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )
