"""Which pages of a peer's fence words a read asks for. Needs no NIXL."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvrelay_transfer.connectors.nixl_words import WORDS_PER_PAGE, pages_of, words_span


@pytest.mark.parametrize("num_blocks", [2, WORDS_PER_PAGE - 1, WORDS_PER_PAGE, WORDS_PER_PAGE + 1, 5000])
@pytest.mark.parametrize("count", [1, 7, 400])
def test_each_page_with_a_word_of_the_blocks_is_read_once(num_blocks: int, count: int) -> None:
    chosen = random.Random(num_blocks * count).sample(range(1, num_blocks), min(count, num_blocks - 1))
    pages = pages_of(np.array(chosen, np.int32), num_blocks)
    assert pages.dtype == np.int32
    assert pages.tolist() == sorted({block // WORDS_PER_PAGE for block in chosen})


def test_the_words_of_a_pool_are_whole_pages() -> None:
    assert words_span(8192, 2).size_bytes == 4096
    assert words_span(8192, WORDS_PER_PAGE).size_bytes == 4096
    assert words_span(8192, WORDS_PER_PAGE + 1).size_bytes == 8192
