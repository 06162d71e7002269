"""What a model does with images in a prompt, as far as the engine has to know."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay_engine.rope_config import MropeConfig


@dataclass(frozen=True, slots=True)
class MediaTraits:
    """Of a model that takes images."""

    hidden_size: int  # of the embeddings that take the place of placeholders
    mrope: MropeConfig | None = None  # None: a token has one position
    max_positions: int = 0  # with M-RoPE: that it has angles for
    whole_runs: bool = False  # tokens of an image see each other: no chunk and no cached prefix ends inside one
