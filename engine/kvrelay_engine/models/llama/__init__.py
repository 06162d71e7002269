"""Llama 3.x (and 2): no biases unless the config asks for them."""

from kvrelay_engine.models.llama import config, model, weights

__all__ = ["config", "model", "weights"]
