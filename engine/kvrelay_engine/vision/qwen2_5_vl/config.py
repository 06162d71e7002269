"""The image side of Qwen2.5-VL's config.json: `vision_config`, with transformers' defaults."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay_core.errors import ConfigError
from kvrelay_engine.config_fields import ConfigFields

MODEL_TYPE = "qwen2_5_vl"


@dataclass(frozen=True, slots=True)
class QwenVisionConfig:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    output_size: int  # hidden size of the text model
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    merge_size: int  # patches a side that become one embedding
    window_size: int  # pixels
    full_attention_layers: tuple[int, ...]
    rope_theta: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_window_size(self) -> int:
        """Side of a window, in merged patches."""
        return self.window_size // self.merge_size // self.patch_size

    def validate(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "patch_size", "temporal_patch_size", "merge_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.json: vision_config: {name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                f"config.json: vision_config: hidden_size {self.hidden_size} over {self.num_heads} heads must be a "
                "multiple of 4, for RoPE over rows and columns"
            )
        if self.merged_window_size < 1:
            raise ConfigError(
                f"config.json: vision_config: window_size {self.window_size} must hold {self.merge_size} patches of "
                f"{self.patch_size} pixels"
            )


def read_config(fields: ConfigFields) -> QwenVisionConfig:
    """Raises ConfigError naming the field that is malformed or not supported."""
    vision = fields.section("vision_config") or fields.empty_section("vision_config")
    _refuse_unsupported(vision)
    rope = vision.section("rope_parameters") or vision.empty_section("rope_parameters")
    config = QwenVisionConfig(
        num_layers=vision.integer("depth", 32),
        hidden_size=vision.integer("hidden_size", 3584),
        intermediate_size=vision.integer("intermediate_size", 3420),
        num_heads=vision.integer("num_heads", 16),
        output_size=vision.integer("out_hidden_size", 3584),
        patch_size=vision.integer("patch_size", 14),
        temporal_patch_size=vision.integer("temporal_patch_size", 2),
        merge_size=vision.integer("spatial_merge_size", 2),
        window_size=vision.integer("window_size", 112),
        full_attention_layers=tuple(vision.integers("fullatt_block_indexes", (7, 15, 23, 31))),
        rope_theta=rope.number("rope_theta", 10_000.0),
    )
    config.validate()
    return config


def _refuse_unsupported(vision: ConfigFields) -> None:
    activation = vision.text("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{vision.name}: hidden_act {activation!r} is not supported; supported is 'silu'")
    if vision.integer("in_channels", 3) != 3:
        raise ConfigError(f"{vision.name}: in_channels must be 3, for red, green and blue")
    rope = vision.section("rope_parameters")
    if rope is not None and rope.text("rope_type", "axial") != "axial":
        raise ConfigError(f"{rope.name}: rope_type {rope.text('rope_type')!r} is not supported; supported is 'axial'")
