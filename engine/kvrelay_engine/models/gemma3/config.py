"""Gemma 3's config.json, of the text models and, in `text_config`, of the vision-language models.

The published files leave out what has the default of transformers; so those defaults are here.
"""

from __future__ import annotations

from dataclasses import replace

from kvrelay_core.errors import ConfigError
from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.model_config import LocalAttention, ModelConfig
from kvrelay_engine.models.dense_config import read_dense_config
from kvrelay_engine.models.layers.mlp import GATES
from kvrelay_engine.models.nested_config import text_fields
from kvrelay_engine.rope_config import RopeConfig, read_rope_section

ARCHITECTURE = "Gemma3ForConditionalGeneration"
TEXT_ARCHITECTURE = "Gemma3ForCausalLM"
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
_DEFAULT_GLOBAL_THETA, _DEFAULT_LOCAL_THETA = 1_000_000.0, 10_000.0
# Of other members of the family: here they are off.
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def read_config(fields: ConfigFields) -> ModelConfig:
    """Of a vision-language model: its images see ahead."""
    return replace(_read(fields, ARCHITECTURE), media_see_ahead=True)


def read_text_config(fields: ConfigFields) -> ModelConfig:
    return _read(fields, TEXT_ARCHITECTURE)


def _read(fields: ConfigFields, architecture: str) -> ModelConfig:
    text = text_fields(fields).with_defaults(**_DEFAULTS)
    _refuse_unsupported(text)
    max_positions = text.integer("max_position_embeddings")
    bias = text.flag("attention_bias", False)
    config = read_dense_config(
        # What it does not read of the text fields is read here.
        text.replaced(layer_types=None, hidden_act=None, tie_word_embeddings=fields.flag("tie_word_embeddings", True)),
        architecture,
        head_dim=text.integer("head_dim"),
        qkv_bias=bias,
        output_bias=bias,
        rope=_read_rope(text, _GLOBAL, max_positions),
    )
    config = replace(
        config,
        max_model_len=max_positions,  # of the stretched context already
        local=LocalAttention(
            text.integer("sliding_window"), _read_pattern(text, config), _read_rope(text, _LOCAL, max_positions)
        ),
        attention_scale=_read_scalar(text) ** -0.5,
        embedding_scale=config.hidden_size**0.5,
        activation=text.text("hidden_activation"),
    )
    config.validate()
    return config


def _read_rope(text: ConfigFields, layer_type: str, max_positions: int) -> RopeConfig:
    """transformers 5 has an object for each type of layer; before, only global layers had a scaling."""
    thetas = {
        _GLOBAL: text.number("rope_theta", _DEFAULT_GLOBAL_THETA),
        _LOCAL: text.number("rope_local_base_freq", _DEFAULT_LOCAL_THETA),
    }
    by_type = text.section("rope_parameters")
    if by_type is not None:
        section = by_type.section(layer_type)
    else:
        section = text.section("rope_scaling") if layer_type == _GLOBAL else None
    return read_rope_section(section or text.empty_section("rope_parameters"), thetas[layer_type], max_positions)


def _read_pattern(text: ConfigFields, config: ModelConfig) -> tuple[bool, ...]:
    """Which layers are local: as listed, or all but every so many."""
    types = text.texts("layer_types")
    if not types:
        pattern = text.integer("sliding_window_pattern")
        if pattern < 1:
            raise ConfigError(f"{text.name}: sliding_window_pattern must be at least 1, not {pattern}")
        return tuple((index + 1) % pattern != 0 for index in range(config.num_layers))
    if len(types) != config.num_layers or set(types) - {_LOCAL, _GLOBAL}:
        raise ConfigError(
            f"{text.name}: layer_types must name {_LOCAL} or {_GLOBAL} for each of {config.num_layers} layers"
        )
    return tuple(layer_type == _LOCAL for layer_type in types)


def _read_scalar(text: ConfigFields) -> float:
    scalar = text.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise ConfigError(f"{text.name}: query_pre_attn_scalar must be positive, not {scalar}")
    return scalar


def _refuse_unsupported(text: ConfigFields) -> None:
    for name in _SOFTCAPS:
        if text.has(name):
            raise ConfigError(f"{text.name}: {name} is not supported; Gemma 3 has none")
    if text.flag("use_bidirectional_attention", False):
        raise ConfigError(
            f"{text.name}: use_bidirectional_attention true is not supported; that model generates nothing"
        )
    activation = text.text("hidden_activation")
    if activation not in GATES:
        raise ConfigError(f"{text.name}: hidden_activation {activation!r} is not supported; gelu_pytorch_tanh is")
