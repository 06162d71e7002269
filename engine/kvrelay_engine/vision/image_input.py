"""What lies between the bytes of a picture or a video and its embeddings, and who makes and takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvrelay_core.media.video import MediaContent


@dataclass(frozen=True, slots=True)
class ImageInput:
    """A picture or a video, ready for the tower of its family."""

    pixels: Tensor  # on the CPU, float32 until it is staged; each family's processor says how it is laid out
    grid: tuple[int, int, int]  # (time, height, width), counted in what the family's processor says
    num_patches: int  # that the tower computes: its cost
    num_tokens: int  # embeddings that come out

    @property
    def num_bytes(self) -> int:
        return self.pixels.nbytes

    def staged_for(self, device: torch.device, dtype: torch.dtype) -> ImageInput:
        """In the tower's dtype and, for a GPU, in memory that it copies from by itself, beside what it computes."""
        pixels = self.pixels.to(dtype)
        return replace(self, pixels=pixels.pin_memory() if device.type == "cuda" else pixels)


class ImageProcessor(Protocol):
    def decoding_bytes(self, data: MediaContent) -> int:
        """About the most that `process` takes, by headers. Raises what it raises."""
        ...

    def process(self, data: MediaContent) -> ImageInput:
        """Decodes a picture, or the frames of a video, and prepares it. Raises InvalidRequestError where it is not one
        or too large, UnsupportedError for a video where the model takes none.

        Takes a CPU core for as long as it lasts (decoding dominates) and may be called from several threads.
        """
        ...


class VisionTower(Protocol):
    def encode(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """Each item's embeddings [num_tokens, hidden size of the text model], in the tower's dtype and device.

        Items of a batch know nothing of each other, whatever their sizes.
        """
        ...


def to_device(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Those of a staged picture while the caller goes on. A GPU also converts, where nobody has staged them."""
    return pixels.to(device, non_blocking=True).to(dtype)
