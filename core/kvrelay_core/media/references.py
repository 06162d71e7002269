"""What must hold of the media references of a prompt, whoever made them."""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay_core.errors import InvalidRequestError
from kvrelay_core.hashing import HASH_BYTES
from kvrelay_core.request import MediaReference

_MOST_SECONDS = 1e6


def check_references(media: Sequence[MediaReference], num_prompt_tokens: int) -> None:
    """Raises InvalidRequestError unless they lie one behind the other within the prompt."""
    taken = 0
    for index, item in enumerate(media):
        if len(item.content_hash) != HASH_BYTES:
            raise InvalidRequestError(f"media[{index}].content_hash must have {HASH_BYTES} bytes", field="media")
        end = item.offset + item.num_tokens
        if item.num_tokens < 1 or item.offset < taken or end > num_prompt_tokens:
            raise InvalidRequestError(
                f"media[{index}] takes tokens {item.offset} to {end}; it must take at least one, begin at {taken} or "
                f"later, where the item before it ends, and end within the prompt's {num_prompt_tokens} tokens",
                field="media",
            )
        _check_time(item, index)
        taken = end


def _check_time(item: MediaReference, index: int) -> None:
    if not 0 <= item.seconds_per_grid <= _MOST_SECONDS:
        raise InvalidRequestError(
            f"media[{index}].seconds_per_grid is {item.seconds_per_grid}; allowed: 0 to {_MOST_SECONDS:g}",
            field="media",
        )
    if item.seconds_per_grid and item.first_row:
        raise InvalidRequestError(
            f"media[{index}] is a video that begins at row {item.first_row}; a video has one run of placeholders, "
            "which begins at row 0",
            field="media",
        )
