"""What the engine knows of a model's shape and maths, whatever its architecture.

Each architecture's `models/<name>/config.py` makes one from `config.json`. It knows nothing of weights, devices
or torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import msgspec

from kvrelay_core.errors import ConfigError
from kvrelay_engine.rope_config import MropeConfig, RopeConfig


@dataclass(frozen=True, slots=True)
class LocalAttention:
    """Some layers see only the last tokens, and have a RoPE of their own."""

    window: int  # tokens that a token sees, itself included
    is_local: tuple[bool, ...]  # by layer
    rope: RopeConfig


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with RoPE, grouped-query attention, RMS norms and a gated MLP."""

    architecture: str  # as config.json names it, e.g. LlamaForCausalLM
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int  # tokens that positions are defined for
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    dtype: str  # of the checkpoint
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    mrope: MropeConfig | None = None  # None: a token has one position, not three
    local: LocalAttention | None = None  # None: every layer sees the whole context
    attention_scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    embedding_scale: float | None = None  # of the embeddings of tokens, not of media; None: 1
    activation: str | None = None  # of the MLP's gate; None: silu
    media_see_ahead: bool = False  # the tokens of an image see each other in both directions

    @property
    def kv_groups(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each KV group. Local layers are the second one, where there are both kinds."""
        is_local = self.local.is_local if self.local is not None else (False,) * self.num_layers
        full = tuple(layer for layer in range(self.num_layers) if not is_local[layer])
        local = tuple(layer for layer in range(self.num_layers) if is_local[layer])
        return (full, local) if full and local else (full or local,)

    def validate(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_heads} must be a multiple of "
                f"num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim must be even for RoPE, not {self.head_dim}")
        if self.local is not None and self.local.window < 1:
            raise ConfigError(f"config.json: sliding_window must be at least 1, not {self.local.window}")
        if self.mrope is not None and sum(self.mrope.sections) != self.head_dim // 2:
            raise ConfigError(
                f"config.json: mrope_section {list(self.mrope.sections)} must add up to {self.head_dim // 2}, "
                "half of the head size"
            )

    def activation_bytes(self, num_tokens: int, num_logits_rows: int, element_bytes: int) -> int:
        """What a step of that size needs at most beside weights and KV: an estimate on the safe side."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        per_token = 4 * self.hidden_size + 3 * self.intermediate_size + 2 * qkv
        # Logits, their float32 copy, and the sampler's two.
        return 2 * num_tokens * per_token * element_bytes + num_logits_rows * self.vocab_size * (element_bytes + 12)

    def maths_fingerprint_fields(self) -> bytes:
        """Canonical encoding of everything that changes what is computed from the same weight files.

        What most architectures do not have is only there where it is: so their fingerprints stay what they were.
        """
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        del fields["max_model_len"], fields["dtype"]
        if not self.media_see_ahead:
            del fields["media_see_ahead"]
        return msgspec.json.encode(fields, order="deterministic")
