"""Qwen3 (dense): an RMS norm of every query and key head, and a head size of its own."""

from kvrelay_engine.models.qwen3 import config, model, weights

__all__ = ["config", "model", "weights"]
