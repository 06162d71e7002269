"""What the encoder's engine needs of a vision tower and its processor, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from kvrelay_core.media.video import MediaContent


class MediaInput(Protocol):
    """A decoded item, ready for the tower."""

    @property
    def num_patches(self) -> int:
        """What it costs to encode."""
        ...

    @property
    def num_tokens(self) -> int:
        """Rows that the tower makes of it."""
        ...

    @property
    def num_bytes(self) -> int:
        """That it takes in memory."""
        ...


I = TypeVar("I", bound=MediaInput)  # noqa: E741  (an input of one family)
Made = TypeVar("Made", bound=MediaInput, covariant=True)
Taken = TypeVar("Taken", bound=MediaInput, contravariant=True)


class Processor(Protocol[Made]):
    """May be called from several threads."""

    def decoding_bytes(self, data: MediaContent) -> int:
        """The most that `process` takes, told without decoding. Raises KvRelayError as `process` does."""
        ...

    def process(self, data: MediaContent) -> Made:
        """Decodes an item. Raises InvalidRequestError for what is no image, or too large a one, UnsupportedError for a
        video that the model cannot take."""
        ...


class Tower(Protocol[Taken]):
    fingerprint: bytes  # of the weights and of what the processor does
    hidden_size: int  # of the text model
    dtype: str  # of the rows

    def encode(self, inputs: Sequence[Taken]) -> list[Tensor]:
        """Rows [num_tokens, hidden_size] of each; complete when it returns."""
        ...
