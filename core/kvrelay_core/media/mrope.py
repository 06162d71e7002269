"""M-RoPE: the three-component positions that Qwen's vision-language models give to tokens.

A text token has one position for time, height and width alike. The tokens of an image or a video have those of its
merged patches, counted from where it begins; the text after it goes on behind the highest of them. So positions run
behind the tokens' indices from there on, or ahead of them where a video is long: its steps in time are as far apart as
the model counts seconds. Knows nothing of tokens' ids, embeddings or frequencies.

`transformers` since 5.3 has text go on behind the longer side of a video's frames, though their time may reach further;
the models were trained as it is done here (docs/adr/0021).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from kvrelay_core.errors import InvalidRequestError

_SINGLE = struct.Struct("<f")

Components = tuple[list[int], list[int], list[int]]  # time, height, width: one position a token


class MediaItem(Protocol):
    """An image or a video in a prompt. Its tokens are the placeholders `offset : offset + num_tokens`."""

    @property
    def offset(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int, int]:
        """Time, height and width in patches, before merging."""
        ...

    @property
    def seconds_per_grid(self) -> float:
        """From one of the grid's steps in time to the next; 0: it is an image, whose steps count one position each."""
        ...


class MropeScale(Protocol):
    """What a model's configuration says of its positions."""

    @property
    def merge_size(self) -> int:
        """Squared it is the number of patches that make one token."""
        ...

    @property
    def tokens_per_second(self) -> float:
        """Positions in time that make a second of video."""
        ...


@dataclass(frozen=True, slots=True)
class MropePositions:
    """Positions of a whole sequence: those of its prompt, then index + delta for all that follows."""

    prompt: Components
    delta: int

    @classmethod
    def of(cls, num_prompt_tokens: int, media: Iterable[MediaItem], scale: MropeScale) -> MropePositions:
        """See `mrope_positions`."""
        return cls(*mrope_positions(num_prompt_tokens, media, scale))

    def between(self, start: int, end: int) -> Components:
        """Of the tokens `start : end`, which may lie before, across or behind the prompt's end."""
        first_generated = max(start, len(self.prompt[0]))
        generated = range(first_generated + self.delta, max(first_generated, end) + self.delta)
        time, height, width = ([*component[start:end], *generated] for component in self.prompt)
        return time, height, width


def mrope_positions(num_prompt_tokens: int, media: Iterable[MediaItem], scale: MropeScale) -> tuple[Components, int]:
    """The prompt's positions, and what to add to the index of a later token to have its position.

    `media` is in the order of the prompt. Raises InvalidRequestError where an item overlaps another, leaves the prompt,
    or has not as many tokens as its grid.
    """
    components: Components = ([], [], [])
    position = num_done = 0
    for item in media:
        _check(item, num_done, num_prompt_tokens, scale.merge_size)
        position = _add_text(components, position, item.offset - num_done)
        position = _add_frames(components, position, item, scale)
        num_done = item.offset + item.num_tokens
    position = _add_text(components, position, num_prompt_tokens - num_done)
    return components, position - num_prompt_tokens


def mrope_delta(media: Iterable[MediaItem], scale: MropeScale) -> int:
    """What `mrope_positions` gives beside the positions, without making them: the same, at a cost by items."""
    return sum(_extent(*_axes(item, scale)) - item.num_tokens for item in media)


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


def _add_frames(components: Components, position: int, item: MediaItem, scale: MropeScale) -> int:
    """The position after it."""
    steps, rows, columns = _axes(item, scale)
    times, heights, widths = components
    for step in steps:
        for height in range(position, position + rows):
            times.extend([position + step] * columns)
            heights.extend([height] * columns)
            widths.extend(range(position, position + columns))
    return position + _extent(steps, rows, columns)


def _extent(steps: list[int], rows: int, columns: int) -> int:
    """Positions that it takes: of its longest side, or of its time, however many tokens there are."""
    return max(steps[-1] + 1, rows, columns)


def _axes(item: MediaItem, scale: MropeScale) -> tuple[list[int], int, int]:
    """When each step of the grid is, counted from the item's first position; and tokens in height and in width."""
    frames, height, width = item.grid
    interval = 1.0
    if item.seconds_per_grid:
        interval = _float32(scale.tokens_per_second * _float32(item.seconds_per_grid))
    times = [int(_float32(index * interval)) for index in range(frames)]
    return times, height // scale.merge_size, width // scale.merge_size


def _float32(value: float) -> float:
    """The nearest number of 32 bits: the precision in which `transformers` counts time."""
    rounded: float = _SINGLE.unpack(_SINGLE.pack(value))[0]
    return rounded
