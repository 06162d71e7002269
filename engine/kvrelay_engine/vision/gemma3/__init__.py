"""Gemma 3: SigLIP's tower over pictures of one size, and a projector to few embeddings; crops of long pictures."""

from kvrelay_engine.vision.gemma3 import config, processor, tower, weights

__all__ = ["config", "processor", "tower", "weights"]
