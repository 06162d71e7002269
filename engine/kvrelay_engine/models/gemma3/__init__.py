"""Gemma 3: local and global layers, norms around attention and MLP. Of its vision-language models the text side."""

from kvrelay_engine.models.gemma3 import config, model, weights

__all__ = ["config", "model", "weights"]
