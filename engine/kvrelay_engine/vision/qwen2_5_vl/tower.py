"""Qwen2.5-VL's tower: pre-norm layers over the packed patches of a batch, then the merger.

An addition and the norm that follows it are one operation, as in the text models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvrelay_engine.models.layers.linear import linear_for_prompts
from kvrelay_engine.models.layers.mlp import GatedMlp
from kvrelay_engine.models.layers.rope import RopeRows
from kvrelay_engine.vision.image_input import ImageInput, to_device
from kvrelay_engine.vision.qwen2_5_vl.config import QwenVisionConfig
from kvrelay_engine.vision.qwen2_5_vl.patch_layout import lay_out
from kvrelay_engine.vision.qwen2_5_vl.weights import LayerWeights, MergerWeights, TowerWeights
from kvrelay_engine.vision.segments import Segments
from kvrelay_kernels.norm import add_rms_norm, rms_norm
from kvrelay_kernels.rope import apply_rope

_EPS = 1e-6  # not in config.json


class QwenVisionTower:
    def __init__(self, config: QwenVisionConfig, weights: TowerWeights) -> None:
        """Takes the weights over."""
        self._config = config
        self._device, self._dtype = weights.patch_EI.device, weights.patch_EI.dtype
        self._embed_patches = linear_for_prompts(weights.patch_EI, None)
        self._norms_E = [norm_E for layer in weights.layers for norm_E in (layer.attention_norm_E, layer.mlp_norm_E)]
        self._attentions = [Attention(layer, config) for layer in weights.layers]
        self._mlps = [GatedMlp(layer.mlp, linear_for_prompts) for layer in weights.layers]
        self._norms_E.append(weights.merger.norm_E)
        self._merge = Merger(weights.merger)

    @torch.inference_mode()
    def encode(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """See `VisionTower.encode`. `pixels` are patches [n, 3 x frames x side x side] in the processor's order."""
        patches_NI = torch.cat([to_device(image.pixels, self._device, self._dtype) for image in images])
        layout = lay_out([image.grid for image in images], self._config)
        order_M = layout.order_M.to(self._device)
        x_NE = self._embed_patches(_permute(patches_NI, order_M))
        rope = self._rope_rows(layout.coordinates_N2.to(self._device))
        windows, frames = layout.windows.to(self._device), layout.frames.to(self._device)
        merged_MO = self._merge(self._run_layers(x_NE, rope, windows, frames))
        in_order_MO = torch.empty_like(merged_MO).index_copy_(0, order_M, merged_MO)
        return list(in_order_MO.split_with_sizes([image.num_tokens for image in images]))

    def _run_layers(self, residual_NE: Tensor, rope: RopeRows, windows: Segments, frames: Segments) -> Tensor:
        """The sum after the last layer, normalised for the merger."""
        norms_E = iter(self._norms_E)
        x_NE = rms_norm(residual_NE, next(norms_E), _EPS)
        for index, (attention, mlp) in enumerate(zip(self._attentions, self._mlps, strict=True)):
            segments = frames if index in self._config.full_attention_layers else windows
            x_NE = attention(x_NE, rope, segments)
            x_NE, residual_NE = add_rms_norm(x_NE, residual_NE, next(norms_E), _EPS)
            x_NE = mlp(x_NE)
            x_NE, residual_NE = add_rms_norm(x_NE, residual_NE, next(norms_E), _EPS)
        return x_NE

    def _rope_rows(self, coordinates_N2: Tensor) -> RopeRows:
        """A row of the table for each patch: D/2 cosines, then D/2 sines; the first half of each by its row."""
        half = self._config.head_dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=coordinates_N2.device) / half
        angles_NC = (coordinates_N2.unsqueeze(-1) * (1.0 / self._config.rope_theta**exponents)).flatten(1)
        rows_N = torch.arange(len(angles_NC), device=angles_NC.device)
        return RopeRows(rows_N, torch.cat([angles_NC.cos(), angles_NC.sin()], dim=-1))


class Attention:
    """Each patch sees its segment: a window, or the frame."""

    def __init__(self, weights: LayerWeights, config: QwenVisionConfig) -> None:
        self._heads = (3, config.num_heads, config.head_dim)
        self._project_qkv = linear_for_prompts(weights.qkv_OE, weights.qkv_bias_O)
        self._project_output = linear_for_prompts(weights.output_EE, weights.output_bias_E)

    def __call__(self, x_NE: Tensor, rope: RopeRows, segments: Segments) -> Tensor:
        q_NHD, k_NHD, v_NHD = self._project_qkv(x_NE).view(-1, *self._heads).unbind(1)
        q_NHD, k_NHD = apply_rope(q_NHD, k_NHD, rope.rows_N, rope.cos_sin_PD)
        return self._project_output(segments.attend(q_NHD, k_NHD, v_NHD).flatten(1))


class Merger:
    """The patches of one embedding, side by side, through two projections."""

    def __init__(self, weights: MergerWeights) -> None:
        self._inner_size = weights.inner_II.shape[0]
        self._project_inner = linear_for_prompts(weights.inner_II, weights.inner_bias_I)
        self._project_output = linear_for_prompts(weights.output_OI, weights.output_bias_O)

    def __call__(self, normed_NE: Tensor) -> Tensor:
        return self._project_output(F.gelu(self._project_inner(normed_NE.reshape(-1, self._inner_size))))


def _permute(patches_NI: Tensor, order_M: Tensor) -> Tensor:
    """Moves whole embeddings: the patches that merge stay together."""
    return patches_NI.view(len(order_M), -1, patches_NI.shape[1]).index_select(0, order_M).flatten(0, 1)
