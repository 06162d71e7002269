"""Qwen2.5-VL: pictures of any size, attention within windows but in a few layers, 2 x 2 patches merged at the end."""

from kvrelay_engine.vision.qwen2_5_vl import config, processor, tower, weights

__all__ = ["config", "processor", "tower", "weights"]
