"""Where prompts with images are cut: never inside an image whose tokens see each other, and always onward."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st
from media_rig import MediaPair, first_token_of, prompt_of

from kvrelay_core.request import MediaReference
from kvrelay_engine.media_chunks import clip_chunk, clip_prefix, end_of

# Gaps of text and sizes of images, in turn.
layouts = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 20)), max_size=5)


def references(layout: list[tuple[int, int]]) -> list[MediaReference]:
    media: list[MediaReference] = []
    offset = 0
    for gap, size in layout:
        media.append(MediaReference(bytes([len(media)]) * 32, offset + gap, size))
        offset += gap + size
    return media


@given(layouts, st.integers(0, 9), st.lists(st.integers(1, 30), min_size=1), st.booleans())
def test_chunks_cover_the_prompt_and_split_no_whole_run(
    layout: list[tuple[int, int]], tail: int, budgets: list[int], whole_runs: bool
) -> None:
    media = references(layout)
    num_tokens = (end_of(media[-1]) if media else 0) + tail
    start, cuts = 0, set()
    for turn in range(num_tokens + 1):
        if start == num_tokens:
            break
        budget = min(budgets[turn % len(budgets)], num_tokens - start)
        taken = clip_chunk(media, start, budget, lambda _: True, whole_runs=whole_runs, may_overrun=True)
        assert taken > 0, "a prompt that is alone always goes on"
        assert taken <= budget or any(start == run.offset and taken == run.num_tokens for run in media)
        start += taken
        cuts.add(start)
    assert start == num_tokens
    if whole_runs:
        assert not any(run.offset < cut < end_of(run) for run in media for cut in cuts)


@given(layouts, st.integers(0, 60), st.integers(0, 30), st.sets(st.integers(0, 4)), st.booleans(), st.booleans())
def test_a_chunk_ends_before_what_is_not_here(
    layout: list[tuple[int, int]], start: int, num_tokens: int, here: set[int], whole_runs: bool, may_overrun: bool
) -> None:
    media = references(layout)
    ids = {id(run): index for index, run in enumerate(media)}
    taken = clip_chunk(
        media, start, num_tokens, lambda run: ids[id(run)] in here, whole_runs=whole_runs, may_overrun=may_overrun
    )
    covered = [index for index, run in enumerate(media) if taken and run.offset < start + taken and end_of(run) > start]
    assert set(covered) <= here
    assert taken <= num_tokens or may_overrun


@given(layouts, st.integers(0, 20), st.sampled_from([1, 4, 16]))
def test_a_cached_prefix_ends_inside_no_run(layout: list[tuple[int, int]], num_units: int, unit: int) -> None:
    media = references(layout)
    clipped = clip_prefix(media, num_units * unit, unit)
    assert 0 <= clipped <= num_units * unit and clipped % unit == 0
    assert not any(run.offset < clipped < end_of(run) for run in media)
    longer = range(clipped + unit, num_units * unit + 1, unit)
    assert all(any(run.offset < cut < end_of(run) for run in media) for cut in longer), "as long as may be"


parts = st.lists(
    st.one_of(st.integers(1, 12), st.binary(min_size=1, max_size=24).map(lambda data: b"p" + data)),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(parts, st.integers(1, 5), st.sampled_from([8, 16, 32]))
def test_an_engine_splits_no_image_and_answers_right_cold_and_warm(
    layout: list[int | bytes], tail: int, budget: int
) -> None:
    pair = MediaPair(whole_runs=True, num_blocks=60, max_num_seqs=4, max_batched_tokens=budget)
    try:
        media = prompt_of(*layout, tail)[1]
        for request_id, rest in enumerate((tail, tail + 1)):
            pair.prefill.runner.batches.clear()
            pair.start(request_id, *layout, rest)
            pair.run()
            assert pair.first_token(request_id) == first_token_of(*layout, rest)
            sizes = [size for batch in pair.prefill.runner.batches for size in batch]
            begin = len(prompt_of(*layout, rest)[0]) - sum(sizes)  # what came from the prefix cache
            cuts = list(accumulate(sizes, initial=begin))
            assert not any(run.offset < cut < end_of(run) for run in media for cut in cuts)
        pair.check_empty()
    finally:
        pair.close()
