"""The families whose image side can be served, by the `model_type` of their config.json.

To add one: a folder with `config.py`, `weights.py`, `tower.py` and `processor.py`, an entry here, and a checkpoint
of it among those of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from kvrelay_core.errors import ConfigError
from kvrelay_core.media.limits import MediaLimits
from kvrelay_core.media.processor_config import ProcessorConfig
from kvrelay_engine.config_fields import ConfigFields
from kvrelay_engine.vision import gemma3, qwen2_5_vl
from kvrelay_engine.vision.image_input import ImageProcessor, VisionTower
from kvrelay_engine.weight_reader import WeightReader

Config = TypeVar("Config")
Weights = TypeVar("Weights")


@dataclass(frozen=True, slots=True)
class Family(Generic[Config, Weights]):
    """The configuration is a dataclass; it has `output_size`, the hidden size of the text model."""

    model_type: str
    prefixes: tuple[str, ...]  # of its tensors
    read_config: Callable[[ConfigFields], Config]
    read_weights: Callable[[WeightReader, Config], Weights]
    build: Callable[[Config, Weights], VisionTower]
    make_processor: Callable[[ProcessorConfig, Config, MediaLimits], ImageProcessor]


_QWEN2_5_VL: Final = Family(
    qwen2_5_vl.config.MODEL_TYPE,
    qwen2_5_vl.weights.PREFIXES,
    qwen2_5_vl.config.read_config,
    qwen2_5_vl.weights.read_weights,
    qwen2_5_vl.tower.QwenVisionTower,
    qwen2_5_vl.processor.make_processor,
)
_GEMMA3: Final = Family(
    gemma3.config.MODEL_TYPE,
    gemma3.weights.PREFIXES,
    gemma3.config.read_config,
    gemma3.weights.read_weights,
    gemma3.tower.GemmaVisionTower,
    gemma3.processor.make_processor,
)
FAMILIES: Final = MappingProxyType[str, Family[Any, Any]](
    {family.model_type: family for family in (_QWEN2_5_VL, _GEMMA3)}
)


def find_family(fields: ConfigFields) -> Family[Any, Any]:
    """The family of a config.json. Raises ConfigError naming what is supported."""
    model_type = fields.text("model_type", "none")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{fields.name}: model_type {model_type} has no image side that is supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
