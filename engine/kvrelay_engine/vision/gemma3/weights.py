"""The tensors of Gemma 3's tower and projector, under any of the names that checkpoints have had for them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvrelay_engine.vision.gemma3.config import GemmaVisionConfig
from kvrelay_engine.weight_reader import WeightReader

PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


@dataclass(frozen=True, slots=True)
class NormWeights:
    scale_E: Tensor
    bias_E: Tensor


@dataclass(frozen=True, slots=True)
class LinearWeights:
    weight_OI: Tensor
    bias_O: Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: NormWeights
    qkv: LinearWeights  # O = 3 H D: all query heads, then key heads, then value heads
    output: LinearWeights
    mlp_norm: NormWeights
    up: LinearWeights
    down: LinearWeights


@dataclass(frozen=True, slots=True)
class TowerWeights:
    patch_ECKK: Tensor  # K pixels of a patch's side
    patch_bias_E: Tensor
    positions_LE: Tensor  # L patches of a view
    layers: list[LayerWeights]
    norm: NormWeights
    projector_norm_E: Tensor  # less 1
    projector_EO: Tensor  # O hidden size of the text model


def read_weights(reader: WeightReader, config: GemmaVisionConfig) -> TowerWeights:
    tower, projector = _find_tower(reader), _find_projector(reader)
    size, patch = config.hidden_size, config.patch_size
    for name in reader.names:
        if name.startswith(f"{tower}head."):
            reader.ignore(name)  # SigLIP's own pooling, which the projector stands in for
    return TowerWeights(
        patch_ECKK=reader.read(f"{tower}embeddings.patch_embedding.weight", (size, 3, patch, patch)),
        patch_bias_E=reader.read(f"{tower}embeddings.patch_embedding.bias", (size,)),
        positions_LE=reader.read(f"{tower}embeddings.position_embedding.weight", (config.patches_per_side**2, size)),
        layers=[_read_layer(reader, config, f"{tower}encoder.layers.{index}") for index in range(config.num_layers)],
        norm=_read_norm(reader, config, f"{tower}post_layernorm"),
        projector_norm_E=reader.read(f"{projector}mm_soft_emb_norm.weight", (size,)),
        projector_EO=reader.read(f"{projector}mm_input_projection_weight", (size, config.output_size)),
    )


def _find_tower(reader: WeightReader) -> str:
    """What stands before `embeddings`."""
    found = (name for name in reader.names if name.endswith("embeddings.patch_embedding.weight"))
    return next(found, "vision_tower.vision_model.embeddings.").partition("embeddings.")[0]


def _find_projector(reader: WeightReader) -> str:
    nested = "model.multi_modal_projector."
    return nested if reader.has(f"{nested}mm_input_projection_weight") else "multi_modal_projector."


def _read_layer(reader: WeightReader, config: GemmaVisionConfig, prefix: str) -> LayerWeights:
    size, inner = config.hidden_size, config.intermediate_size
    projections, rows = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"], [size] * 3
    return LayerWeights(
        attention_norm=_read_norm(reader, config, f"{prefix}.layer_norm1"),
        qkv=LinearWeights(
            reader.read_fused([f"{name}.weight" for name in projections], rows, size),
            reader.read_fused([f"{name}.bias" for name in projections], rows),
        ),
        output=_read_linear(reader, f"{prefix}.self_attn.out_proj", size, size),
        mlp_norm=_read_norm(reader, config, f"{prefix}.layer_norm2"),
        up=_read_linear(reader, f"{prefix}.mlp.fc1", inner, size),
        down=_read_linear(reader, f"{prefix}.mlp.fc2", size, inner),
    )


def _read_norm(reader: WeightReader, config: GemmaVisionConfig, prefix: str) -> NormWeights:
    shape = (config.hidden_size,)
    return NormWeights(reader.read(f"{prefix}.weight", shape), reader.read(f"{prefix}.bias", shape))


def _read_linear(reader: WeightReader, prefix: str, outputs: int, inputs: int) -> LinearWeights:
    return LinearWeights(reader.read(f"{prefix}.weight", (outputs, inputs)), reader.read(f"{prefix}.bias", (outputs,)))
