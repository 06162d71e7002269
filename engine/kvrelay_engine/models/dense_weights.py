"""Reads the tensors of a dense decoder checkpoint, fusing what one matrix product can do at once.

Names are those of the Llama family in transformers; which biases exist is in the config. What an architecture
has beyond that is read in its own `weights.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.layers.attention import AttentionWeights
from kvrelay_engine.models.layers.decoder import DecoderWeights, LayerWeights
from kvrelay_engine.models.layers.mlp import MlpWeights
from kvrelay_engine.weight_reader import WeightReader

ReadAttention = Callable[[WeightReader, ModelConfig, str], AttentionWeights]


def read_decoder(
    reader: WeightReader, config: ModelConfig, read_attention: ReadAttention, model_prefix: str = "model"
) -> DecoderWeights:
    """`read_attention(reader, config, prefix)` reads the attention of the layer whose tensors have that prefix."""
    vocabulary = (config.vocab_size, config.hidden_size)
    layers = []
    for index in range(config.num_layers):
        prefix = f"{model_prefix}.layers.{index}"
        layers.append(
            LayerWeights(
                input_norm_E=reader.read(f"{prefix}.input_layernorm.weight", (config.hidden_size,)),
                attention=read_attention(reader, config, f"{prefix}.self_attn"),
                mlp_norm_E=reader.read(f"{prefix}.post_attention_layernorm.weight", (config.hidden_size,)),
                mlp=read_mlp(reader, config, f"{prefix}.mlp"),
            )
        )
    if config.tie_embeddings:
        reader.ignore("lm_head.weight")
    return DecoderWeights(
        embedding_VE=reader.read(f"{model_prefix}.embed_tokens.weight", vocabulary),
        layers=layers,
        norm_E=reader.read(f"{model_prefix}.norm.weight", (config.hidden_size,)),
        output_VE=None if config.tie_embeddings else reader.read("lm_head.weight", vocabulary),
    )


def read_attention(reader: WeightReader, config: ModelConfig, prefix: str) -> AttentionWeights:
    query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections, rows = [f"{prefix}.{name}_proj" for name in "qkv"], [query_size, kv_size, kv_size]
    output = f"{prefix}.o_proj"
    return AttentionWeights(
        qkv_OE=reader.read_fused([f"{name}.weight" for name in projections], rows, config.hidden_size),
        qkv_bias_O=reader.read_fused([f"{name}.bias" for name in projections], rows) if config.qkv_bias else None,
        output_EQ=reader.read(f"{output}.weight", (config.hidden_size, query_size)),
        output_bias_E=reader.read(f"{output}.bias", (config.hidden_size,)) if config.output_bias else None,
    )


def read_mlp(reader: WeightReader, config: ModelConfig, prefix: str) -> MlpWeights:
    projections, rows = [f"{prefix}.gate_proj", f"{prefix}.up_proj"], [config.intermediate_size] * 2
    down = f"{prefix}.down_proj"
    return MlpWeights(
        gate_up_OE=reader.read_fused([f"{name}.weight" for name in projections], rows, config.hidden_size),
        gate_up_bias_O=reader.read_fused([f"{name}.bias" for name in projections], rows) if config.mlp_bias else None,
        down_EF=reader.read(f"{down}.weight", (config.hidden_size, config.intermediate_size)),
        down_bias_E=reader.read(f"{down}.bias", (config.hidden_size,)) if config.mlp_bias else None,
    )
