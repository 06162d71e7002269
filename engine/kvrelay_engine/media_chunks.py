"""Where a prompt with media may be cut: into chunks, and behind a cached prefix.

Where the tokens of an image see each other (`whole_runs`), an image's run of placeholders is computed in one chunk, and
a prefix that is taken from the cache never ends inside one: its first tokens have seen its last ones. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvrelay_core.request import MediaReference


def end_of(reference: MediaReference) -> int:
    """The first token behind the run."""
    return reference.offset + reference.num_tokens


def clip_chunk(
    media: Sequence[MediaReference],
    start: int,
    num_tokens: int,
    is_here: Callable[[MediaReference], bool],
    *,
    whole_runs: bool,
    may_overrun: bool,
) -> int:
    """How many of the tokens [start, start + num_tokens) to compute now; may be 0.

    `media` by offset. The chunk ends before the first run whose embedding is not here. With `whole_runs` it ends before
    a run that it would split; a run that begins at `start` is taken whole when `may_overrun`, and waits when not.
    """
    end = start + num_tokens
    for reference in media:
        if end_of(reference) <= start:
            continue
        if reference.offset >= end:
            break
        if not is_here(reference):
            return max(0, reference.offset - start)
        if whole_runs and end < end_of(reference):
            if reference.offset > start:
                return reference.offset - start
            return end_of(reference) - start if may_overrun and num_tokens > 0 else 0
    return num_tokens


def clip_prefix(media: Sequence[MediaReference], num_tokens: int, unit_tokens: int) -> int:
    """The longest prefix of at most `num_tokens`, a multiple of `unit_tokens` as it is, that ends inside no run."""
    for reference in reversed(media):
        if reference.offset < num_tokens < end_of(reference):
            num_tokens = reference.offset // unit_tokens * unit_tokens
    return num_tokens
