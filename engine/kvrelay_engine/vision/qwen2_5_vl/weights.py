"""The tensors of Qwen2.5-VL's tower, under either name that checkpoints have had for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kvrelay_engine.models.layers.mlp import MlpWeights
from kvrelay_engine.vision.qwen2_5_vl.config import QwenVisionConfig
from kvrelay_engine.weight_reader import WeightReader

PREFIXES = ("visual.", "model.visual.")
# GPUs take rows of whole 16 elements several times as fast as others; the 7B model has 3,420 inner units.
_INNER_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm_E: Tensor
    qkv_OE: Tensor  # O = 3 H D: all query heads, then key heads, then value heads
    qkv_bias_O: Tensor
    output_EE: Tensor
    output_bias_E: Tensor
    mlp_norm_E: Tensor
    mlp: MlpWeights


@dataclass(frozen=True, slots=True)
class MergerWeights:
    norm_E: Tensor
    inner_II: Tensor  # I = merge_size^2 E
    inner_bias_I: Tensor
    output_OI: Tensor  # O hidden size of the text model
    output_bias_O: Tensor


@dataclass(frozen=True, slots=True)
class TowerWeights:
    patch_EI: Tensor  # I values of a patch
    layers: list[LayerWeights]
    merger: MergerWeights


def read_weights(reader: WeightReader, config: QwenVisionConfig) -> TowerWeights:
    prefix = next((prefix for prefix in PREFIXES if reader.has(f"{prefix}patch_embed.proj.weight")), PREFIXES[0])
    size, patch = config.hidden_size, config.patch_size
    kernel = (size, 3, config.temporal_patch_size, patch, patch)
    return TowerWeights(
        patch_EI=reader.read(f"{prefix}patch_embed.proj.weight", kernel).flatten(1),
        layers=[_read_layer(reader, config, f"{prefix}blocks.{index}") for index in range(config.num_layers)],
        merger=_read_merger(reader, config, f"{prefix}merger"),
    )


def _read_layer(reader: WeightReader, config: QwenVisionConfig, prefix: str) -> LayerWeights:
    size = config.hidden_size
    return LayerWeights(
        attention_norm_E=reader.read(f"{prefix}.norm1.weight", (size,)),
        qkv_OE=reader.read(f"{prefix}.attn.qkv.weight", (3 * size, size)),
        qkv_bias_O=reader.read(f"{prefix}.attn.qkv.bias", (3 * size,)),
        output_EE=reader.read(f"{prefix}.attn.proj.weight", (size, size)),
        output_bias_E=reader.read(f"{prefix}.attn.proj.bias", (size,)),
        mlp_norm_E=reader.read(f"{prefix}.norm2.weight", (size,)),
        mlp=_read_mlp(reader, config, f"{prefix}.mlp"),
    )


def _read_mlp(reader: WeightReader, config: QwenVisionConfig, prefix: str) -> MlpWeights:
    """With as many inner units added as make a whole multiple; they compute 0, and nothing comes of them."""
    projections, rows = [f"{prefix}.gate_proj", f"{prefix}.up_proj"], [config.intermediate_size] * 2
    gate_up_OE = reader.read_fused([f"{name}.weight" for name in projections], rows, config.hidden_size)
    gate_up_bias_O = reader.read_fused([f"{name}.bias" for name in projections], rows)
    down_EF = reader.read(f"{prefix}.down_proj.weight", (config.hidden_size, config.intermediate_size))
    added = -config.intermediate_size % _INNER_MULTIPLE
    return MlpWeights(
        gate_up_OE=F.pad(gate_up_OE.view(2, -1, config.hidden_size), (0, 0, 0, added)).flatten(0, 1),
        gate_up_bias_O=F.pad(gate_up_bias_O.view(2, -1), (0, added)).flatten(),
        down_EF=F.pad(down_EF, (0, added)),
        down_bias_E=reader.read(f"{prefix}.down_proj.bias", (config.hidden_size,)),
    )


def _read_merger(reader: WeightReader, config: QwenVisionConfig, prefix: str) -> MergerWeights:
    inner = config.hidden_size * config.merge_size**2
    return MergerWeights(
        norm_E=reader.read(f"{prefix}.ln_q.weight", (config.hidden_size,)),
        inner_II=reader.read(f"{prefix}.mlp.0.weight", (inner, inner)),
        inner_bias_I=reader.read(f"{prefix}.mlp.0.bias", (inner,)),
        output_OI=reader.read(f"{prefix}.mlp.2.weight", (config.output_size, inner)),
        output_bias_O=reader.read(f"{prefix}.mlp.2.bias", (config.output_size,)),
    )
