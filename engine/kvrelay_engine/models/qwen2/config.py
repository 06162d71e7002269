"""Qwen2's config.json. It has no bias flags: queries, keys and values always have one."""

from __future__ import annotations

from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.dense_config import read_dense_config

ARCHITECTURE = "Qwen2ForCausalLM"


def read_config(fields: ConfigFields) -> ModelConfig:
    return read_dense_config(
        fields,
        ARCHITECTURE,
        head_dim=fields.integer("head_dim") if fields.has("head_dim") else None,
        qkv_bias=True,
    )
