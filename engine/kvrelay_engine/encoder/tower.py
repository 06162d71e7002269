"""What the encoder's engine needs of a vision tower and its processor, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor


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


I = TypeVar("I", bound=MediaInput)  # noqa: E741  (an input of one family)


class Tower(Protocol[I]):
    fingerprint: bytes  # of the weights and of what the processor does
    hidden_size: int  # of the text model
    dtype: str  # of the rows

    def process(self, data: bytes) -> I:
        """Decodes an item. Raises InvalidRequestError for what is no image, or too large a one."""
        ...

    def encode(self, inputs: Sequence[I]) -> list[Tensor]:
        """Rows [num_tokens, hidden_size] of each; complete when it returns."""
        ...
