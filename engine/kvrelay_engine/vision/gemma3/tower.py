"""SigLIP's tower over views of one size, and Gemma 3's projector: pooled, normalised, projected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvrelay_engine.models.layers.linear import Linear, linear_for_prompts
from kvrelay_engine.vision.gemma3.config import GemmaVisionConfig
from kvrelay_engine.vision.gemma3.weights import LayerWeights, LinearWeights, NormWeights, TowerWeights
from kvrelay_engine.vision.image_input import ImageInput, to_device
from kvrelay_engine.vision.segments import Segments
from kvrelay_kernels.norm import rms_norm


class GemmaVisionTower:
    def __init__(self, config: GemmaVisionConfig, weights: TowerWeights) -> None:
        """Takes the weights over."""
        self._config, self._weights = config, weights
        self._embed_patches = linear_for_prompts(weights.patch_ECKK.flatten(1), weights.patch_bias_E)
        self._layers = [Layer(config, layer) for layer in weights.layers]
        self._norm = LayerNorm(config, weights.norm)
        self._project = Projector(config, weights)

    @torch.inference_mode()
    def encode(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """See `VisionTower.encode`. `pixels` are views [n, 3, side, side]; embeddings come view by view."""
        positions_LE = self._weights.positions_LE
        device, dtype = positions_LE.device, positions_LE.dtype
        views_BCSS = torch.cat([to_device(image.pixels, device, dtype) for image in images])
        x_BLE = self._embed_patches(_cut(views_BCSS, self._config.patch_size)) + positions_LE
        num_views, view_patches, _ = x_BLE.shape
        x_NE, views = x_BLE.flatten(0, 1), Segments(((num_views, view_patches),))
        for layer in self._layers:
            x_NE = layer(x_NE, views)
        embeddings_MO = self._project(self._norm(x_NE))
        return list(embeddings_MO.split_with_sizes([image.num_tokens for image in images]))


class Layer:
    """Pre-norm: attention within each view, then an MLP, each added to what came in."""

    def __init__(self, config: GemmaVisionConfig, weights: LayerWeights) -> None:
        self._heads = (3, config.num_heads, config.head_dim)
        self._attention_norm = LayerNorm(config, weights.attention_norm)
        self._project_qkv = _linear(weights.qkv)
        self._project_output = _linear(weights.output)
        self._mlp_norm = LayerNorm(config, weights.mlp_norm)
        self._project_up = _linear(weights.up)
        self._project_down = _linear(weights.down)

    def __call__(self, x_NE: Tensor, views: Segments) -> Tensor:
        q_NHD, k_NHD, v_NHD = self._project_qkv(self._attention_norm(x_NE)).view(-1, *self._heads).unbind(1)
        x_NE = x_NE + self._project_output(views.attend(q_NHD, k_NHD, v_NHD).flatten(1))
        inner_NI = self._project_up(self._mlp_norm(x_NE))
        return x_NE + self._project_down(F.gelu(inner_NI, approximate="tanh"))


class LayerNorm:
    def __init__(self, config: GemmaVisionConfig, weights: NormWeights) -> None:
        self._weights = weights
        self._eps = config.norm_eps

    def __call__(self, x_NE: Tensor) -> Tensor:
        scale_E, bias_E = self._weights.scale_E, self._weights.bias_E
        return F.layer_norm(x_NE, scale_E.shape, scale_E, bias_E, self._eps)


class Projector:
    """From the patches of a view to a square of embeddings, each the mean of a square of patches."""

    def __init__(self, config: GemmaVisionConfig, weights: TowerWeights) -> None:
        self._config = config
        self._norm_E = 1.0 + weights.projector_norm_E.float()
        self._project = linear_for_prompts(weights.projector_EO.t().contiguous(), None)

    def __call__(self, x_NE: Tensor) -> Tensor:
        """[M, O] of [N, E]."""
        config, side = self._config, self._config.patches_per_side
        views_BELL = x_NE.view(-1, side, side, config.hidden_size).permute(0, 3, 1, 2).contiguous()
        pooled_BEMM = F.avg_pool2d(views_BELL, config.pooled_side)
        pooled_ME = pooled_BEMM.flatten(2).transpose(1, 2).flatten(0, 1)
        normed_ME = rms_norm(pooled_ME.float().contiguous(), self._norm_E, config.norm_eps)
        return self._project(normed_ME.to(x_NE.dtype))


def _cut(views_BCSS: Tensor, patch_size: int) -> Tensor:
    """The patches of each view, row by row: [B, L, C K K]. Their product with the weights is not a convolution to
    torch, which would compute that in TF32 on a GPU."""
    num_views, colors, side, _ = views_BCSS.shape
    per_side = side // patch_size
    patches_BCRKRK = views_BCSS.view(num_views, colors, per_side, patch_size, per_side, patch_size)
    return patches_BCRKRK.permute(0, 2, 4, 1, 3, 5).reshape(num_views, per_side**2, -1)


def _linear(weights: LinearWeights) -> Linear:
    return linear_for_prompts(weights.weight_OI, weights.bias_O)
