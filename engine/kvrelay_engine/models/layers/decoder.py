"""A stack of decoder layers between an embedding and an output projection.

Each layer is pre-norm: attention, then MLP, each added to a residual; an addition and the norm that follows it
are one operation. What attention and MLP give may be normalised once more before it is added. The architectures
differ in their attention, which they pass in, and in what their config says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.layers.attention import Attention, AttentionWeights
from kvrelay_engine.models.layers.linear import Linear, MakeLinear, TiedLinear
from kvrelay_engine.models.layers.media import place_media
from kvrelay_engine.models.layers.mlp import GatedMlp, MlpWeights
from kvrelay_engine.models.layers.rope import Rope, rope_table
from kvrelay_engine.models.layers.step import ModelStep
from kvrelay_kernels.norm import add_rms_norm, rms_norm


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm_E: Tensor
    attention: AttentionWeights
    mlp_norm_E: Tensor
    mlp: MlpWeights
    attention_output_norm_E: Tensor | None = None  # both or none
    mlp_output_norm_E: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding_VE: Tensor
    layers: list[LayerWeights]
    norm_E: Tensor
    output_VE: Tensor | None  # None: tied to the embedding


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention: Attention
    mlp_norm_E: Tensor
    mlp: GatedMlp
    next_norm_E: Tensor  # the next layer's input norm, or the last norm of the model
    attention_output_norm_E: Tensor | None
    mlp_output_norm_E: Tensor | None
    is_local: bool  # its attention has a window, and the RoPE of such layers


class Decoder:
    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        attention_class: type[Attention],
        make_linear: MakeLinear,
    ) -> None:
        """Takes the weights over: some are repacked."""
        self._ropes = _make_ropes(config, weights.norm_E.device)
        self._eps = config.rms_norm_eps
        self._first_norm_E = weights.layers[0].input_norm_E
        next_norms_E = [*(layer.input_norm_E for layer in weights.layers[1:]), weights.norm_E]
        self._layers = [
            _make_layer(config, index, layer, next_norm_E, attention_class, make_linear)
            for index, (layer, next_norm_E) in enumerate(zip(weights.layers, next_norms_E, strict=True))
        ]
        self._embedding_VE = weights.embedding_VE
        self._embedding_scale = _rounded(config.embedding_scale, weights.embedding_VE.dtype)
        self._project_output: Linear
        self.copied_bytes = 0  # of weights that are held twice
        self.table_bytes = sum(rope.size_bytes for rope in self._ropes)
        if weights.output_VE is not None:
            self._project_output = make_linear(weights.output_VE, None)
        else:
            tied = TiedLinear(weights.embedding_VE, make_linear)
            self._project_output = tied
            self._embedding_VE = tied.rows_OI
            self.copied_bytes = tied.copied_bytes

    def __call__(self, step: ModelStep, layer_pools: Sequence[Tensor]) -> Tensor:
        """Logits [R, V] in the model's dtype. `layer_pools[i]` is layer i's part of its group's pool.

        All that the last layer's other tokens leave is their keys and values: what follows is computed for R tokens.
        """
        rope_rows = [rope.rows(step) for rope in self._ropes]
        steps = (step, step.local or step)
        residual_NE = self._embed(step)
        x_NE = rms_norm(residual_NE, self._first_norm_E, self._eps)
        for layer, layer_pool in zip(self._layers, layer_pools, strict=True):
            only = steps[layer.is_local].logits if layer is self._layers[-1] else None
            x_NE = layer.attention(x_NE, steps[layer.is_local], rope_rows[layer.is_local], layer_pool, only)
            if only is not None:
                if not len(x_NE):
                    return x_NE.new_empty(0, self._embedding_VE.shape[0])
                residual_NE = residual_NE.index_select(0, only.rows_R)
            if layer.attention_output_norm_E is not None:
                x_NE = rms_norm(x_NE, layer.attention_output_norm_E, self._eps)
            x_NE, residual_NE = add_rms_norm(x_NE, residual_NE, layer.mlp_norm_E, self._eps)
            x_NE = layer.mlp(x_NE)
            if layer.mlp_output_norm_E is not None:
                x_NE = rms_norm(x_NE, layer.mlp_output_norm_E, self._eps)
            x_NE, residual_NE = add_rms_norm(x_NE, residual_NE, layer.next_norm_E, self._eps)
        return self._project_output(x_NE)

    def _embed(self, step: ModelStep) -> Tensor:
        """[N, E]: tokens, scaled where the model does that, and media in their places, which are not."""
        embeddings_NE = F.embedding(step.token_ids_N, self._embedding_VE)
        if self._embedding_scale is not None:
            embeddings_NE.mul_(self._embedding_scale)
        place_media(step.media, embeddings_NE)
        return embeddings_NE


def _rounded(factor: float | None, dtype: torch.dtype) -> float | None:
    """As a weight of the model would be."""
    return None if factor is None else torch.tensor(factor, dtype=dtype).item()


def _make_ropes(config: ModelConfig, device: torch.device) -> list[Rope]:
    """Of layers that see the whole context, then of local ones, where there are any."""
    ropes = [config.rope] if config.local is None else [config.rope, config.local.rope]
    return [Rope(rope_table(rope, config.head_dim, config.max_model_len, device), config.mrope) for rope in ropes]


def _make_layer(
    config: ModelConfig,
    index: int,
    weights: LayerWeights,
    next_norm_E: Tensor,
    attention_class: type[Attention],
    make_linear: MakeLinear,
) -> DecoderLayer:
    is_local = config.local is not None and config.local.is_local[index]
    window = config.local.window if config.local is not None and is_local else 0
    return DecoderLayer(
        attention_class(config, weights.attention, make_linear, window),
        weights.mlp_norm_E,
        GatedMlp(weights.mlp, make_linear, config.activation),
        next_norm_E,
        weights.attention_output_norm_E,
        weights.mlp_output_norm_E,
        is_local,
    )
