"""Qwen2.5-VL's config.json: Qwen2's fields, flat or in `text_config`, and the M-RoPE sections among RoPE's own."""

from __future__ import annotations

from dataclasses import replace

from kvrelay_core.errors import ConfigError
from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.dense_config import read_dense_config
from kvrelay_engine.models.nested_config import text_fields
from kvrelay_engine.rope_config import MropeConfig, RopeConfig, read_rope_section, rope_section

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
_DEFAULT_THETA = 1_000_000.0
_DEFAULT_SECTIONS = (16, 24, 24)
_DEFAULT_TOKENS_PER_SECOND = 4.0


def read_config(fields: ConfigFields) -> ModelConfig:
    text = text_fields(fields).with_defaults(rms_norm_eps=1e-5)
    tied = fields.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False)
    config = read_dense_config(
        text.replaced(tie_word_embeddings=tied), ARCHITECTURE, qkv_bias=True, rope=_read_rope(text)
    )
    config = replace(config, mrope=_read_mrope(fields, text))
    config.validate()
    return config


def _read_rope(text: ConfigFields) -> RopeConfig:
    """M-RoPE's frequencies are RoPE's, scaled or not; older files name it as if it were a kind of scaling."""
    section = rope_section(text)
    plain = {name: None for name in ("rope_type", "type") if section.text(name, "") == "mrope"}
    return read_rope_section(
        section.replaced(mrope_section=None, **plain),
        text.number("rope_theta", _DEFAULT_THETA),
        text.integer("max_position_embeddings"),
    )


def _read_mrope(fields: ConfigFields, text: ConfigFields) -> MropeConfig:
    sections = rope_section(text).integers("mrope_section", _DEFAULT_SECTIONS)
    if len(sections) != 3 or min(sections) < 1:
        raise ConfigError(f"{fields.name}: mrope_section must be three positive numbers, not {sections}")
    vision = fields.section("vision_config") or fields.empty_section("vision_config")
    merge_size = vision.integer("spatial_merge_size", 2)
    if merge_size < 1:
        raise ConfigError(f"{fields.name}: spatial_merge_size must be at least 1, not {merge_size}")
    tokens_per_second = vision.number("tokens_per_second", _DEFAULT_TOKENS_PER_SECOND)
    if not tokens_per_second >= 0:
        raise ConfigError(f"{fields.name}: tokens_per_second must not be negative, but is {tokens_per_second}")
    return MropeConfig((sections[0], sections[1], sections[2]), merge_size, tokens_per_second)
