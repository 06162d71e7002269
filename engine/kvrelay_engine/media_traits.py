"""What a model does with images in a prompt, as far as the engine has to know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MediaTraits:
    """Of a model that takes images."""

    hidden_size: int  # of the embeddings that take the place of placeholders
    merge_size: int | None = None  # with M-RoPE: patches a side that make one token; None: a token has one position
    whole_runs: bool = False  # tokens of an image see each other: no chunk and no cached prefix ends inside one
