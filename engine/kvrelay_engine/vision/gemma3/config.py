"""The image side of Gemma 3's config.json: SigLIP's `vision_config` with transformers' defaults, and the projector."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from kvrelay_core.errors import ConfigError
from kvrelay_engine.config_fields import ConfigFields

MODEL_TYPE = "gemma3"


@dataclass(frozen=True, slots=True)
class GemmaVisionConfig:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    image_size: int  # pixels of either side
    patch_size: int  # pixels
    norm_eps: float
    tokens_per_view: int
    output_size: int  # hidden size of the text model

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def pooled_side(self) -> int:
        """Patches of either side that become one embedding."""
        return self.patches_per_side // isqrt(self.tokens_per_view)

    def validate(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "patch_size", "tokens_per_view"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} of the image side must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"config.json: vision_config: hidden_size {self.hidden_size} is no multiple of {self.num_heads} heads"
            )
        if self.image_size % self.patch_size or (
            self.pooled_side**2 * self.tokens_per_view != self.patches_per_side**2
        ):
            raise ConfigError(
                f"config.json: mm_tokens_per_image {self.tokens_per_view} must divide a picture of {self.image_size} "
                f"pixels a side, cut into patches of {self.patch_size}, into equal squares"
            )


def read_config(fields: ConfigFields) -> GemmaVisionConfig:
    """Raises ConfigError naming the field that is missing, malformed or not supported."""
    vision = fields.section("vision_config") or fields.empty_section("vision_config")
    text = fields.section("text_config") or fields.empty_section("text_config")
    _refuse_unsupported(vision)
    config = GemmaVisionConfig(
        num_layers=vision.integer("num_hidden_layers", 12),
        hidden_size=vision.integer("hidden_size", 768),
        intermediate_size=vision.integer("intermediate_size", 3072),
        num_heads=vision.integer("num_attention_heads", 12),
        image_size=vision.integer("image_size", 224),
        patch_size=vision.integer("patch_size", 16),
        norm_eps=vision.number("layer_norm_eps", 1e-6),
        tokens_per_view=fields.integer("mm_tokens_per_image", 256),
        output_size=text.integer("hidden_size"),
    )
    config.validate()
    return config


def _refuse_unsupported(vision: ConfigFields) -> None:
    model_type = vision.text("model_type", "siglip_vision_model")
    if model_type != "siglip_vision_model":
        raise ConfigError(f"{vision.name}: model_type {model_type!r} is not supported; supported is SigLIP")
    activation = vision.text("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise ConfigError(
            f"{vision.name}: hidden_act {activation!r} is not supported; supported is 'gelu_pytorch_tanh'"
        )
    if vision.integer("num_channels", 3) != 3:
        raise ConfigError(f"{vision.name}: num_channels must be 3, for red, green and blue")
