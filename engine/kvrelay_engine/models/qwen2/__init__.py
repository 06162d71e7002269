"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from kvrelay_engine.models.qwen2 import config, model, weights

__all__ = ["config", "model", "weights"]
