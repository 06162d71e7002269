from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_router.stop_strings import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = "".join(map(matcher.push, pieces))
    return text + matcher.flush(), matcher.matched


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "matched"),
    [
        (["end"], ["the e", "n", "d of"], "the ", "end"),
        (["end"], ["the en", "try"], "the entry", None),
        (["end"], ["en"], "en", None),
        (["bcd", "abcde"], ["abcde"], "a", "bcd"),
        (["cd", "bcd"], ["abcd"], "a", "bcd"),
        (["aab"], ["aaab"], "a", "aab"),
        (["x"], [], "", None),
        ([], ["anything", " goes"], "anything goes", None),
        (["\n\n"], ["a\n", "\n", "b"], "a", "\n\n"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], text: str, matched: str | None) -> None:
    assert run(stops, pieces) == (text, matched)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["stop"])
    assert matcher.push("do not st") == "do not "
    assert matcher.push("art") == "start"


texts = st.text("ab", max_size=12)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), texts, st.data())
def test_the_pieces_make_no_difference(stops: list[str], text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = run(stops, list(text))
    assert run(stops, pieces) == whole
    out, matched = whole
    if matched is None:
        assert out == text and not any(stop in text for stop in stops)
    else:
        assert text.startswith(out + matched) and not any(stop in out for stop in stops)
