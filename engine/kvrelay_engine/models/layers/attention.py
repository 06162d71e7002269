"""Self-attention of one layer over the paged pool, with one fused projection for queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvrelay_engine.model_config import ModelConfig
from kvrelay_engine.models.layers.linear import MakeLinear
from kvrelay_engine.models.layers.rope import RopeRows
from kvrelay_engine.models.layers.step import LogitsRows, ModelStep
from kvrelay_kernels.attention import paged_attention
from kvrelay_kernels.kv_cache import write_kv
from kvrelay_kernels.rope import apply_rope


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    qkv_OE: Tensor  # O = (H + 2 K) * D: all query heads, then key heads, then value heads
    qkv_bias_O: Tensor | None
    output_EQ: Tensor
    output_bias_E: Tensor | None
    query_norm_D: Tensor | None = None  # both or none
    key_norm_D: Tensor | None = None


class Attention:
    """Grouped-query attention with RoPE, over the whole context or through a window."""

    def __init__(
        self, config: ModelConfig, weights: AttentionWeights, make_linear: MakeLinear, window: int = 0
    ) -> None:
        """`window` is the tokens that a token sees, itself included; 0: all before it."""
        self._head_dim = config.head_dim
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self._window = window
        self._project_qkv = make_linear(weights.qkv_OE, weights.qkv_bias_O)
        self._project_output = make_linear(weights.output_EQ, weights.output_bias_E)

    def __call__(
        self, x_NE: Tensor, step: ModelStep, rope: RopeRows, layer_pool: Tensor, only: LogitsRows | None = None
    ) -> Tensor:
        """[N, E], or [R, E] of the `only` tokens that are wanted.

        Writes the keys and values of all tokens into `layer_pool` [num_blocks, 2, K, T, D] first.
        """
        num_tokens = x_NE.shape[0]
        qkv_NHD = self._project_qkv(x_NE).view(num_tokens, -1, self._head_dim)
        q_NHD, k_NKD, v_NKD = qkv_NHD.split_with_sizes(self._heads, dim=1)
        q_NHD, k_NKD = self.normalise(q_NHD, k_NKD)
        q_NHD, k_NKD = apply_rope(q_NHD, k_NKD, rope.rows_N, rope.cos_sin_PD)
        write_kv(k_NKD, v_NKD, layer_pool, step.slots_N)
        attention = step.attention
        if only is not None:
            q_NHD, attention = q_NHD.index_select(0, only.rows_R), only.attention
            if not attention.num_sequences:
                return x_NE[:0]
        out_NHD = paged_attention(q_NHD, layer_pool, attention, self._scale, self._window)
        return self._project_output(out_NHD.flatten(1))

    def normalise(self, q_NHD: Tensor, k_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """What an architecture does to queries and keys before RoPE; nothing here."""
        return q_NHD, k_NKD
