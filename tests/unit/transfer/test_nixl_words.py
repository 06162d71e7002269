"""Which pages of a peer's fence words a read asks for, and where each word is in them. Needs no NIXL."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvrelay_transfer.connectors.nixl_words import WORDS_PER_PAGE, WordPlan, num_pages, words_span


@pytest.mark.parametrize("num_blocks", [2, WORDS_PER_PAGE - 1, WORDS_PER_PAGE, WORDS_PER_PAGE + 1, 5000])
@pytest.mark.parametrize("count", [1, 7, 400])
def test_each_word_is_found_where_its_page_lands(num_blocks: int, count: int) -> None:
    chosen = random.Random(num_blocks * count).sample(range(1, num_blocks), min(count, num_blocks - 1))
    blocks = np.array(chosen, np.int32)
    remote = np.zeros(num_pages(num_blocks) * WORDS_PER_PAGE, np.uint64)
    remote[:num_blocks] = 1000 + np.arange(num_blocks, dtype=np.uint64)
    plan = WordPlan.of(blocks, num_blocks)
    landed = remote.reshape(-1, WORDS_PER_PAGE)[plan.pages].reshape(-1)
    assert landed[plan.places].tolist() == [1000 + block for block in chosen]
    assert plan.pages.tolist() == sorted({block // WORDS_PER_PAGE for block in chosen})


def test_the_words_of_a_pool_are_whole_pages() -> None:
    assert words_span(8192, 2).size_bytes == 4096
    assert words_span(8192, WORDS_PER_PAGE).size_bytes == 4096
    assert words_span(8192, WORDS_PER_PAGE + 1).size_bytes == 8192
