"""Fence words: what changes a word, and what it looks like."""

from __future__ import annotations

import numpy as np

from kvrelay_transfer.fence import FenceWords, RemoteWords, agree


def make_words(num_blocks: int = 4, epoch: bytes = b"\xff\xee\xdd\xcc" + bytes(12)) -> tuple[FenceWords, RemoteWords]:
    array = np.zeros(num_blocks, np.uint64)
    return FenceWords(array, epoch), RemoteWords(array)


def test_a_word_begins_as_epoch_and_generation_zero() -> None:
    words, _ = make_words()
    assert words.read(2) == 0xCCDDEEFF << 32


def test_a_bump_changes_one_word_and_readers_see_it() -> None:
    words, remote = make_words()
    before = remote.read([0, 1, 2, 3])
    assert words.bump(1) == before[1] + 1
    assert remote.read([0, 1, 2, 3]) == (before[0], before[1] + 1, before[2], before[3])


def test_words_agree_in_any_form_and_to_the_last_bit() -> None:
    words = (1, (1 << 63) + 1)
    as_array = np.array(words, np.uint64)
    assert agree(words, as_array) and agree(as_array, as_array.copy()) and agree((), np.empty(0, np.uint64))
    # As floats, which numpy makes of a tuple of both kinds, these are equal.
    assert not agree((1, (1 << 63) + 2), as_array)
    assert not agree((1, (1 << 63) + 2), words)
    assert not agree(words[:1], as_array) and not agree((), as_array) and not agree(words[::-1], as_array)


def test_the_generation_wraps_without_touching_the_epoch() -> None:
    array = np.zeros(1, np.uint64)
    words = FenceWords(array, b"\x01\x00\x00\x00" + bytes(12))
    array[0] += np.uint64(0xFFFFFFFF)
    assert words.bump(0) == 1 << 32


def test_starts_differ_in_every_word() -> None:
    first, _ = make_words(epoch=b"aaaa" + bytes(12))
    second, _ = make_words(epoch=b"bbbb" + bytes(12))
    assert first.read(0) != second.read(0)
