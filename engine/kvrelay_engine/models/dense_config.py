"""Reads the fields of `config.json` that all dense decoder architectures share.

What differs (biases, QK norm, an explicit head size) is in each architecture's own `config.py`.
"""

from __future__ import annotations

from kvrelay_core.errors import ConfigError
from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.rope_config import RopeConfig, max_context, read_rope

DTYPES = ("float32", "bfloat16", "float16")


def read_dense_config(
    fields: ConfigFields,
    architecture: str,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    rope: RopeConfig | None = None,
) -> ModelConfig:
    """`rope` is what the architecture has read itself, None: as most write it.

    Raises ConfigError naming the field that is missing, malformed or not supported."""
    _refuse_unsupported(fields)
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if num_heads < 1:
        raise ConfigError(f"{fields.name}: num_attention_heads must be at least 1, not {num_heads}")
    if head_dim is None and hidden_size % num_heads:
        raise ConfigError(
            f"{fields.name}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads} "
            "and there is no head_dim"
        )
    max_positions = fields.integer("max_position_embeddings")
    rope = rope or read_rope(fields, max_positions)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim if head_dim is not None else hidden_size // num_heads,
        max_model_len=max_context(rope, max_positions),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=read_dtype(fields),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
    )
    config.validate()
    return config


def _refuse_unsupported(fields: ConfigFields) -> None:
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{fields.name}: hidden_act {activation!r} is not supported; supported is 'silu'")
    if fields.flag("use_sliding_window", False):
        raise ConfigError(f"{fields.name}: use_sliding_window true is not supported; only full attention is")
    other_layers = sorted(set(fields.texts("layer_types")) - {"full_attention"})
    if other_layers:
        raise ConfigError(
            f"{fields.name}: layer_types {', '.join(other_layers)} not supported; supported is 'full_attention'"
        )
    if fields.section("quantization_config") is not None:
        raise ConfigError(f"{fields.name}: quantization_config is not supported; take an unquantized checkpoint")


def read_dtype(fields: ConfigFields) -> str:
    """`dtype`, or `torch_dtype` as transformers 4 wrote it; float32 where neither is there."""
    dtype = fields.text("dtype", fields.text("torch_dtype", "float32"))
    if dtype not in DTYPES:
        raise ConfigError(f"{fields.name}: dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    return dtype
