from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from fake_worker import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from kvrelay_router.detokenizer import Detokenizer
from kvrelay_router.main import load_checkpoint
from kvrelay_router.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level(checkpoint: Path) -> Tokenizer:
    tokenizer = load_checkpoint(str(checkpoint)).tokenizer
    assert tokenizer is not None and tokenizer.is_byte_level
    return tokenizer


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """Decodes as SentencePiece models do: leading spaces, characters as bytes where there is no token."""
    words = ["▁the", "▁a", "b", "▁", "é", "c"]
    vocab = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, **{word: 256 + i for i, word in enumerate(words)}}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(tokenizer, None)


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def ids_of(tokenizer: Tokenizer, tokens: str) -> list[int]:
    """Of one-character tokens, as the vocabulary writes bytes."""
    vocab = tokenizer._tokenizer.get_vocab()
    return [vocab[token] for token in tokens]


TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve\n\tend \u00a0."


async def test_characters_come_whole(byte_level: Tokenizer) -> None:
    ids = await byte_level.encode(TEXT, add_special_tokens=False)
    pieces = pieces_of(byte_level, list(ids))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 20, "it comes as it is decided, not at the end"


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=80))
def test_any_tokens_of_a_byte_level_tokenizer(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(byte_level, ids)) == byte_level.decode(ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 261), st.integers(256, 261), st.sampled_from([0xC3, 0xA9])), max_size=80))
def test_any_tokens_of_a_byte_fallback_tokenizer(byte_fallback: Tokenizer, ids: list[int]) -> None:
    assert not byte_fallback.is_byte_level
    assert "".join(pieces_of(byte_fallback, ids)) == byte_fallback.decode(ids)


def test_an_unfinished_character_waits_and_is_replaced_at_the_end(byte_level: Tokenizer) -> None:
    euro = ids_of(byte_level, "âĤ¬")
    detokenizer = Detokenizer(byte_level)
    assert [detokenizer.push(token) for token in euro] == ["", "", "€"]
    assert detokenizer.push(euro[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_and_unknown_tokens_have_no_text(byte_level: Tokenizer) -> None:
    assert pieces_of(byte_level, [380, 381, 100_000]) == ["", "", "", ""]


def test_a_long_answer_is_decoded_in_small_windows(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level)
    (invalid,) = ids_of(byte_level, "ÿ")
    for token in [65, invalid] * 300:
        detokenizer.push(token)
        assert len(detokenizer._window) <= 24
