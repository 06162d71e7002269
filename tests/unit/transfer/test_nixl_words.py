"""Which pages of a peer's fence words a read asks for, and where they land. Needs no NIXL."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvrelay_core.errors import ConfigError, TransferError
from kvrelay_transfer.connectors.nixl_agent import MemorySpan, NixlAgent, PreparedSpans
from kvrelay_transfer.connectors.nixl_words import WORDS_PER_PAGE, Landings, pages_of, words_span


class PaperAgent(NixlAgent):
    """Registers nothing, and no more than so many spans."""

    def __init__(self, max_spans: int) -> None:
        self._spans_left = max_spans

    def register(self, span: MemorySpan) -> None:
        if not self._spans_left:
            raise ConfigError("no memory can be locked")
        self._spans_left -= 1

    def prepare(self, remote: str | None, span: MemorySpan, part_bytes: int) -> PreparedSpans:
        assert remote is None and span.size_bytes % part_bytes == 0
        return PreparedSpans(None)


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


def test_reads_at_once_land_in_memory_of_their_own() -> None:
    landings = Landings(PaperAgent(2))
    first, second = landings.take(WORDS_PER_PAGE), landings.take(WORDS_PER_PAGE)
    assert not np.shares_memory(first.words, second.words)
    landings.give_back(first)
    assert landings.take(WORDS_PER_PAGE) is first, "and it is used again"


def test_a_landing_is_as_large_as_the_peers_words() -> None:
    landings = Landings(PaperAgent(2))
    small = landings.take(WORDS_PER_PAGE)
    landings.give_back(small)
    large = landings.take(WORDS_PER_PAGE + 1)
    assert len(large.words) == 2 * WORDS_PER_PAGE
    landings.give_back(large)
    assert {landings.take(2), landings.take(WORDS_PER_PAGE + 1)} == {small, large}


def test_memory_that_cannot_be_registered_fails_the_read() -> None:
    with pytest.raises(TransferError, match="no room for a read's fence words"):
        Landings(PaperAgent(0)).take(2)
