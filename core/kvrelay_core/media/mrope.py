"""M-RoPE: the three-component positions that Qwen's vision-language models give to tokens.

A text token has one position for time, height and width alike. The tokens of an image have those of its merged
patches, counted from where the image begins; the text after it goes on after the longer side of the image, so that
positions run behind the tokens' indices from there on. Knows nothing of tokens' ids, embeddings or frequencies.

Images only: the frames of a video are spaced by seconds, which are not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay_core.errors import InvalidRequestError

Components = tuple[list[int], list[int], list[int]]  # time, height, width: one position a token


class MediaItem(Protocol):
    """An image in a prompt. Its tokens are the placeholders `offset : offset + num_tokens`."""

    @property
    def offset(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int, int]:
        """Time, height and width in patches, before merging."""
        ...


@dataclass(frozen=True, slots=True)
class MropePositions:
    """Positions of a whole sequence: those of its prompt, then index + delta for all that follows."""

    prompt: Components
    delta: int

    @classmethod
    def of(cls, num_prompt_tokens: int, media: Iterable[MediaItem], merge_size: int) -> MropePositions:
        """See `mrope_positions`."""
        return cls(*mrope_positions(num_prompt_tokens, media, merge_size))

    def between(self, start: int, end: int) -> Components:
        """Of the tokens `start : end`, which may lie before, across or behind the prompt's end."""
        first_generated = max(start, len(self.prompt[0]))
        generated = range(first_generated + self.delta, max(first_generated, end) + self.delta)
        time, height, width = ([*component[start:end], *generated] for component in self.prompt)
        return time, height, width


def mrope_positions(num_prompt_tokens: int, media: Iterable[MediaItem], merge_size: int = 2) -> tuple[Components, int]:
    """The prompt's positions, and what to add to the index of a later token to have its position.

    `media` is in the order of the prompt; `merge_size` squared patches make one token. Raises InvalidRequestError
    where an item overlaps another, leaves the prompt, or has not as many tokens as its grid.
    """
    components: Components = ([], [], [])
    position = num_done = 0
    for item in media:
        _check(item, num_done, num_prompt_tokens, merge_size)
        position = _add_text(components, position, item.offset - num_done)
        position = _add_image(components, position, item.grid, merge_size)
        num_done = item.offset + item.num_tokens
    _add_text(components, position, num_prompt_tokens - num_done)
    highest = max(max(component, default=-1) for component in components)
    return components, highest + 1 - num_prompt_tokens


def _check(item: MediaItem, num_done: int, num_prompt_tokens: int, merge_size: int) -> None:
    end = item.offset + item.num_tokens
    if not num_done <= item.offset < end <= num_prompt_tokens:
        raise InvalidRequestError(
            f"media tokens {item.offset} to {end} overlap others or leave the prompt of {num_prompt_tokens} tokens; "
            "list media in the order of the prompt"
        )
    frames, height, width = item.grid
    if min(item.grid) < 1 or height % merge_size or width % merge_size:
        raise InvalidRequestError(
            f"a grid of {frames} x {height} x {width} patches is not of whole {merge_size}-blocks"
        )
    num_tokens = frames * (height // merge_size) * (width // merge_size)
    if num_tokens != item.num_tokens:
        raise InvalidRequestError(
            f"a grid of {frames} x {height} x {width} patches makes {num_tokens} tokens, the prompt holds "
            f"{item.num_tokens} for it"
        )


def _add_text(components: Components, position: int, num_tokens: int) -> int:
    """The position after it."""
    for component in components:
        component.extend(range(position, position + num_tokens))
    return position + num_tokens


def _add_image(components: Components, position: int, grid: Sequence[int], merge_size: int) -> int:
    """The position after it: the longer side counts, not the number of tokens."""
    frames, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
    times, heights, widths = components
    for time in range(position, position + frames):
        for height in range(position, position + rows):
            times.extend([time] * columns)
            heights.extend([height] * columns)
            widths.extend(range(position, position + columns))
    return position + max(rows, columns)
