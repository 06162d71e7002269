"""The architectures that can be served, by the name that `config.json` gives them.

To add one: a folder with `config.py`, `weights.py` and `model.py`, an entry here, and a variant of it in the
test checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvrelay_core.errors import ConfigError
from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models import gemma3, llama, qwen2, qwen2_5_vl, qwen3
from kvrelay_engine.models.layers.decoder import Decoder, DecoderWeights
from kvrelay_engine.models.layers.linear import MakeLinear
from kvrelay_engine.weight_reader import WeightReader


@dataclass(frozen=True, slots=True)
class Architecture:
    name: str
    read_config: Callable[[ConfigFields], ModelConfig]
    read_weights: Callable[[WeightReader, ModelConfig], DecoderWeights]
    build: Callable[[ModelConfig, DecoderWeights, MakeLinear], Decoder]
    vision_prefixes: tuple[str, ...] = ()  # of tensors that are the encoder's, not read here


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            llama.config.ARCHITECTURE, llama.config.read_config, llama.weights.read_weights, llama.model.build
        ),
        Architecture(
            qwen2.config.ARCHITECTURE, qwen2.config.read_config, qwen2.weights.read_weights, qwen2.model.build
        ),
        Architecture(
            qwen3.config.ARCHITECTURE, qwen3.config.read_config, qwen3.weights.read_weights, qwen3.model.build
        ),
        Architecture(
            qwen2_5_vl.config.ARCHITECTURE,
            qwen2_5_vl.config.read_config,
            qwen2_5_vl.weights.read_weights,
            qwen2_5_vl.model.build,
            qwen2_5_vl.weights.VISION_PREFIXES,
        ),
        Architecture(
            gemma3.config.TEXT_ARCHITECTURE,
            gemma3.config.read_text_config,
            gemma3.weights.read_weights,
            gemma3.model.build,
        ),
        Architecture(
            gemma3.config.ARCHITECTURE,
            gemma3.config.read_config,
            gemma3.weights.read_weights,
            gemma3.model.build,
            gemma3.weights.VISION_PREFIXES,
        ),
    )
}


def find_architecture(fields: ConfigFields) -> Architecture:
    """The architecture of a config.json. Raises ConfigError naming what is supported."""
    names = fields.texts("architectures")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    found = ", ".join(names) or "none"
    raise ConfigError(f"{fields.name}: architectures {found} not supported; supported are {', '.join(ARCHITECTURES)}")
