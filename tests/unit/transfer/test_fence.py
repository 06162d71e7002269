"""Fence words: what changes a word, and what it looks like."""

from __future__ import annotations

import numpy as np

from kvrelay_transfer.fence import FenceWords, RemoteWords


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


def test_the_generation_wraps_without_touching_the_epoch() -> None:
    array = np.zeros(1, np.uint64)
    words = FenceWords(array, b"\x01\x00\x00\x00" + bytes(12))
    array[0] += np.uint64(0xFFFFFFFF)
    assert words.bump(0) == 1 << 32


def test_starts_differ_in_every_word() -> None:
    first, _ = make_words(epoch=b"aaaa" + bytes(12))
    second, _ = make_words(epoch=b"bbbb" + bytes(12))
    assert first.read(0) != second.read(0)
