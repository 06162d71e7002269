"""The text side of Qwen2.5-VL: Qwen2 with three-component positions. The image side is the encoder's."""

from kvrelay_engine.models.qwen2_5_vl import config, model, weights

__all__ = ["config", "model", "weights"]
