"""Rotary position embedding: its parameters, read from either form that `config.json` has had.

transformers 5 writes one `rope_parameters` object; before it there were `rope_theta` and `rope_scaling`.
The table of cosines and sines is made in `models/layers/rope.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvrelay_core.errors import ConfigError
from kvrelay_engine.config_fields import ConfigFields

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_KNOWN_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",
    ),
}
_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    rope_type: str = "default"
    theta: float = _DEFAULT_THETA
    factor: float = 1.0
    original_max_len: int = 0  # llama3, yarn: tokens of the context before it was extended
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0  # llama3
    attention_factor: float = 1.0  # yarn: multiplies cosines and sines
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True)
class MropeConfig:
    """Which of a token's three positions turns which dimensions, and what the positions of images and videos are of."""

    sections: tuple[int, int, int]  # of D / 2 frequencies: those of time, then of height, then of width
    merge_size: int  # patches, in height and in width, that make one token
    tokens_per_second: float = 4.0  # positions in time that make a second of video


def read_rope(config: ConfigFields, max_positions: int) -> RopeConfig:
    """Reads the RoPE parameters of a config.json. Raises ConfigError on a type or field that is not supported."""
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{config.name}: partial_rotary_factor other than 1 is not supported")
    return read_rope_section(rope_section(config), config.number("rope_theta", _DEFAULT_THETA), max_positions)


def rope_section(config: ConfigFields) -> ConfigFields:
    """The object of the RoPE parameters, empty where there is none."""
    return config.section("rope_parameters") or config.section("rope_scaling") or config.empty_section("rope_scaling")


def read_rope_section(fields: ConfigFields, default_theta: float, max_positions: int) -> RopeConfig:
    """The parameters in one such object. Raises as `read_rope` does."""
    theta = fields.number("rope_theta", default_theta)
    rope_type = fields.text("rope_type", fields.text("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"{fields.name}: RoPE type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{fields.name}: partial_rotary_factor other than 1 is not supported")
    fields.check_known(("rope_theta", "rope_type", "type", "partial_rotary_factor", *_KNOWN_FIELDS[rope_type]))
    if rope_type == "llama3":
        return _read_llama3(fields, theta, max_positions)
    if rope_type == "yarn":
        return _read_yarn(fields, theta, max_positions)
    if rope_type == "linear":
        return RopeConfig("linear", theta, factor=_positive(fields, "factor"))
    return RopeConfig("default", theta)


def max_context(rope: RopeConfig, max_positions: int) -> int:
    """Tokens of context that the parameters are meant for: linear and yarn stretch beyond the trained positions,
    while a llama3 config.json already counts the stretched ones."""
    if rope.rope_type == "linear":
        return int(max_positions * rope.factor)
    if rope.rope_type == "yarn":
        return max(max_positions, int(rope.original_max_len * rope.factor))
    return max_positions


def _read_llama3(fields: ConfigFields, theta: float, max_positions: int) -> RopeConfig:
    low, high = _positive(fields, "low_freq_factor"), _positive(fields, "high_freq_factor")
    if high <= low:
        raise ConfigError(f"{fields.name}: high_freq_factor {high} must be above low_freq_factor {low}")
    return RopeConfig(
        "llama3",
        theta,
        factor=_positive(fields, "factor"),
        original_max_len=fields.integer("original_max_position_embeddings", max_positions),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _read_yarn(fields: ConfigFields, theta: float, max_positions: int) -> RopeConfig:
    original = fields.integer("original_max_position_embeddings", max_positions)
    factor = _positive(fields, "factor") if fields.has("factor") else max_positions / original
    return RopeConfig(
        "yarn",
        theta,
        factor=factor,
        original_max_len=original,
        attention_factor=fields.number("attention_factor", _yarn_attention_factor(fields, factor)),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.flag("truncate", True),
    )


def _yarn_attention_factor(fields: ConfigFields, factor: float) -> float:
    """The paper's temperature, or the ratio of two where both of DeepSeek's multipliers are given."""

    def mscale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0)
    if numerator and denominator:
        return mscale(numerator) / mscale(denominator)
    return mscale(1.0)


def _positive(fields: ConfigFields, name: str) -> float:
    value = fields.number(name)
    if value <= 0:
        raise ConfigError(f"{fields.name}: {name} must be positive, not {value}")
    return value
